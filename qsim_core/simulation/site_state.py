"""The state of sites as tensors by name: static scales, learned steps, counts of calls.

model.decoder.layers.0.fc1:input.scale   [B, 1]
model.decoder.layers.0.fc1:input.zero    the same, where there are zero points
model.decoder.layers.0.fc1:calls         the number of calls: where stochastic rounding draws next
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qsim_core.components.discovery import added
from qsim_core.errors import QsimError
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.standard_schemes import AtScale
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.sites.site import Site
from qsim_core.sites.sites import Sites

STEPS = "qsim_steps"
"""The name of the submodules that hold scales which are trained. A plugin makes them."""


def gather(sites: Sites) -> dict[str, Tensor]:
    """Gather what all sites hold. Raises `QsimError` where a transform has left something else there."""
    tensors: dict[str, Tensor] = {}
    for site in sites.table.values():
        tensors[f"{site.name}:calls"] = torch.tensor(site.calls)
        for role, fixed in site.fixed.items():
            if isinstance(fixed, Scheme) and isinstance(fixed.scale, AtScale):
                tensors[f"{site.name}:{role}.scale"] = torch.tensor([[fixed.scale.scale]])
                continue
            if not isinstance(fixed, StaticScheme):
                raise QsimError(
                    f"{site.name} ({site.named(role)}): what a transform has put there, {fixed}, cannot be saved"
                )
            tensors[f"{site.name}:{role}.scale"] = fixed.scale.detach().clone()
            if fixed.zero is not None:
                tensors[f"{site.name}:{role}.zero"] = fixed.zero.clone()
    counts = {f"{name}:calls": torch.tensor(site.calls) for name, site in sites.operations.table.items()}
    return tensors | counts


def spread(model: nn.Module, sites: Sites, tensors: Mapping[str, Tensor]) -> None:
    """Give the sites what was gathered under the same recipe. Raises `QsimError` if it does not fit them."""
    wanted = {f"{site.name}:{role}.scale" for site in sites.table.values() for role, _ in _holding(site)}
    found = {key for key in tensors if key.endswith(".scale")}
    for key in sorted(wanted ^ found):
        lacking = "the saved state lacks" if key in wanted else "this recipe has no place for the saved"
        raise QsimError(f"{lacking} {key.removesuffix('.scale')}; it was saved under another recipe")
    for site in sites.table.values():
        for role, scheme in _holding(site):
            key = f"{site.name}:{role}"
            _give(model, site, role, scheme, tensors[f"{key}.scale"], tensors.get(f"{key}.zero"))
        site.calls = _count(site.name, tensors)
    for operation in sites.operations.table.values():
        operation.calls = _count(operation.name, tensors)


def _count(name: str, tensors: Mapping[str, Tensor]) -> int:
    return int(tensors.get(f"{name}:calls", torch.tensor(0)))


def _holding(site: Site) -> Iterator[tuple[str, Scheme]]:
    """The roles of a site that hold scales, and their schemes."""
    for role in ("weight", "input", "output") if site.weight else ("input", "input2", "output"):
        scheme = site.planned(role)
        if isinstance(scheme, Scheme) and scheme.needs_held_scales(role):
            yield role, scheme


def _give(model: nn.Module, site: Site, role: str, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> None:
    held = site.fixed.get(role)
    if not isinstance(held, StaticScheme):
        hold(model, site, role, scheme, scale, zero)
        return
    if held.scale.shape != scale.shape:
        shapes = f"{tuple(scale.shape)} and not {tuple(held.scale.shape)}"
        raise QsimError(f"the saved scales of {held.where} are {shapes}; they were saved under another recipe")
    with torch.no_grad():  # in place: an optimizer may know the steps already
        held.scale.copy_(scale)
        if held.zero is not None and zero is not None:
            held.zero.copy_(zero)


def hold(
    model: nn.Module, site: Site, role: str, scheme: Scheme, scale: Tensor, zero: Tensor | None
) -> StaticScheme | Scheme:
    """Put a scheme with its scales [B, 1], or [..., B, 1] for a weight, at a site of a model.

    A scheme that learns its scales starts its training from these. Of a scheme whose scales have a static scale
    themselves, `scale` is that one. Where it is zero, all block scales were, and it becomes the smallest normal number.
    """
    if (inner := scheme.scale_of_scales) is not None:
        least = torch.finfo(torch.float32).tiny
        found = scheme.replace(scale=AtScale(element=inner.element, scale=max(float(scale), least)))
        site.fixed[role] = found
        return found
    where = f"{site.name} ({site.named(role)})"
    with torch.inference_mode(False):  # a training may follow
        scale, zero = scale.detach().clone(), None if zero is None else zero.detach().clone()
    fixed = StaticScheme(scheme, scale, zero, where)
    if scheme.learns:
        fixed = added("learned_scheme", "trains scales, as gradient=lsq does")(fixed, site, role, model)
    site.fixed[role] = fixed
    return fixed
