"""Static calibration: scales found once, in calibration data, and held at the site; learned ones start from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from qsim_core.errors import DataError, RecipeError
from qsim_core.formats.quantizer import Quantizer, SiteQuantizer
from qsim_core.formats.rounding import working
from qsim_core.quantizers.observers import Observer
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import StaticScheme, check_blocks
from qsim_core.simulation.site_state import hold
from qsim_core.sites.site import Site

SPAN = 1e6
"""Scales of one tensor that lie farther apart than this have collapsed."""
CLIPPED = 0.01
"""More than this share of values outside the range is suspicious."""


Place = tuple[str, str]
"""A site's name and a role."""
Statistics = dict[Place, tuple[Tensor, Tensor | None]]
"""Values [B, n] that stand for all that has passed each place, and the number that each stands for."""
Wanted = dict[tuple[str, str, str], Observer]
"""A site's name, a role, and the granularity of its scales -> the observer that gathers values for it."""
Learning = dict[str, tuple[Site, Scheme, Tensor, Tensor | None]]
"""A weight's site -> the scales and zero points where its learned steps start."""


class Fitter:
    """The observer of a calibration run: gathers what passes every site that needs static scales."""

    def __init__(self) -> None:
        self.seen: dict[Place, tuple[Scheme, Observer, int]] = {}
        self.weights = Learning()
        self.batch = 0

    def __call__(self, site: Site, role: str, before: Tensor, after: Tensor, quantizer: Quantizer | None) -> None:
        """Take in a tensor that passes a site, while nothing is quantized. Raises `DataError` on NaN and Inf."""
        scheme, key = _wants(site, role), (site.name, role)
        if scheme is None or not before.numel():  # an expert without tokens
            return
        if role == "weight":
            self.weights.setdefault(site.name, (site, scheme, *_of_weight(scheme, before)))
            return
        scheme, before = _found_for(scheme, before)
        if not (scheme.granularity == "tensor" or isinstance(scheme.granularity, int)):
            raise RecipeError(
                f"{site.name} ({site.named(role)}): {scheme} learns a scale for the tensor or for n along the row, "
                f"not for {scheme.granularity}"
            )
        if not before.isfinite().all():
            raise DataError(f"calibration batch {self.batch} brings NaN or Inf to {site.name}; leave it out")
        if key not in self.seen:
            self.seen[key] = scheme, scheme.range.observer(), scheme.blocks_of(before.shape)
        check_blocks(f"{site.name} ({site.named(role)})", scheme, self.seen[key][2], scheme.blocks_of(before.shape))
        self.seen[key][1].update(*scheme.static_blocks(before))

    def next_batch(self, batch: int) -> None:
        """Note that the tensors that follow are of another batch."""
        self.batch = batch
        for _, observer, _ in self.seen.values():
            observer.next_batch()

    def statistics(self) -> Statistics:
        """Give the values that were gathered at each place."""
        return {key: observer.values() for key, (_, observer, _) in self.seen.items()}


def wanted(sites: Iterable[Site]) -> Wanted:
    """List the places that still need static scales, each with an observer that has seen nothing."""
    found = ((site, role, _wants(site, role)) for site in sites for role in ("input", "input2", "output"))
    return {
        (site.name, role, repr(scheme.granularity) if inner is None else f"scales of {scheme}"): (
            inner or scheme
        ).range.observer()
        for site, role, scheme in found
        if scheme is not None
        for inner in [scheme.scale_of_scales]
    }


def fix(model: nn.Module, sites: Mapping[str, Site], statistics: Statistics, weights: Learning) -> list[str]:
    """Choose the scales and leave them at the model's sites; give a line for each scale that is doubtful."""
    suspicions = []
    for site, scheme, scale, zero in weights.values():
        hold(model, site, "weight", scheme, scale, zero)
    for (name, role), (values, counts) in statistics.items():
        site = sites[name]
        wants = _wants(site, role)
        assert wants is not None
        fixed = hold(model, site, role, wants, *(wants.scale_of_scales or wants).fit(values, counts))
        suspicions += [f"{name} ({site.named(role)}) {what}" for what in _suspicions(fixed, values, counts)]
    missing = [(site, role) for site in sites.values() for role in (*site.input_roles, "output") if _wants(site, role)]
    suspicions += [
        f"{site.name} ({site.named(role)}) saw no calibration data and has no scale" for site, role in missing
    ]
    return suspicions


def _wants(site: Site, role: str) -> Scheme | None:
    """The scheme whose static or learned scales are to be found; None if there is none, or a transform has chosen."""
    scheme = site.planned(role)
    if not isinstance(scheme, Scheme) or role in site.fixed:
        return None
    return scheme if scheme.needs_held_scales(role) else None


def _of_weight(scheme: Scheme, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points, [..., B, 1] each, from which the training of a weight's scales starts.

    Raises `RecipeError` if the experts of a layer would share scales.
    """
    if x.dim() > 2 and not scheme.by_rows:
        raise RecipeError(f"{scheme}: experts cannot share learned scales; give each channel its own")
    blocks = scheme.split(working(x))
    return scheme.fit(blocks, scheme.counts(x, blocks))


def _found_for(scheme: Scheme, x: Tensor) -> tuple[Scheme, Tensor]:
    """The scheme whose static scales are found, and the values that it rounds: the scales of `x`, or `x` itself."""
    inner = scheme.scale_of_scales
    return (scheme, x) if inner is None else (inner, scheme.whole_scales(x).reshape(1, -1))


def _suspicions(fixed: SiteQuantizer, values: Tensor, counts: Tensor | None) -> Iterator[str]:
    """Give the doubts about a scale, for values [B, n] that stand for `counts` each."""
    if not bool((values != 0).any()):
        yield "saw only zeros in the calibration data"
        return
    if not isinstance(fixed, StaticScheme):
        return
    scale = fixed.scale.detach()
    positive = scale[scale > 0]
    if len(positive) and float(positive.max() / positive.min()) > SPAN:
        yield f"has scales from {positive.min():.2g} to {positive.max():.2g}"
    if counts is None:
        return
    units = values / torch.where(scale == 0, 1.0, scale)
    inside = fixed.scheme.coded.passes(units if fixed.zero is None else units + fixed.zero)
    clipped = 1 - float((counts * inside).sum() / counts.sum())
    if clipped > CLIPPED:
        yield f"clips {clipped:.1%} of its values"
