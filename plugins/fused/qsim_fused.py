"""`fused()`: one global scale for the layers that servers fuse into one product."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from qsim_core import Quantizer, RecipeError, Scheme, Transform, hookimpl
from qsim_core.matmuls.call import Call
from qsim_core.quantizers.standard_schemes import AtScale
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context


class Fused(Transform):
    """Gives layers that servers fuse one global scale: the largest of their own. NVFP4's block scales are in its units.

    Fused are the layers of one module that read the same tensor, such as q, k and v, or gate and up. The weights stay
    as they are; their quantizers have the scale as a number, `at_scale(e4m3, s)`. Put transforms that change weights
    before it, and those that round weights, like gptq, after it. A weight whose scales have no scale for the whole
    tensor is left alone and reported.
    """

    name = "fused"

    def apply(self, model: nn.Module, context: Context) -> None:
        """Find the layers with the example, and give them their scales. Raises `RecipeError` for rounded weights."""
        layers = _Layers({weight.name: weight.quantizer for weight in context.weights()})
        context.look(layers.watch)
        sites = {weight.name: weight.site for weight in context.weights()}
        for name in layers.scales:
            group = layers.groups[name]
            if name in context.sites.weights.pinned:
                raise RecipeError(f"{name} is on its grid already; put {self} before the transform that rounded it")
            scale = max(layers.scales[other] for other in group)
            if len(group) == 1:
                context.report(name, note="left alone: no other layer of its module reads the same tensor")
            elif not 0 < scale < math.inf:
                context.report(name, note=f"left alone: its global scale is {scale:g}")
            else:
                sites[name].fixed["weight"] = at_global_scale(layers.quantizers[name], scale)
                others = ", ".join(other for other in group if other != name)
                context.report(name, note=f"has the global scale {scale:.3g} together with {others}")
        for name in sorted(layers.quantizers.keys() - layers.scales.keys()):
            context.report(name, note=f"left alone: {layers.quantizers[name]} has no global scale")


@dataclass
class _Layers:
    """The layers of a forward whose weights have a global scale, by the tensors that they read."""

    quantizers: dict[str, Quantizer]
    """The quantizers of weights by name."""
    scales: dict[str, float] = field(default_factory=dict)
    """The global scale of each weight."""
    groups: dict[str, list[str]] = field(default_factory=dict)
    """For each of these weights, those that read the same tensor, itself too."""
    readers: dict[str, list[tuple[ReferenceType[Tensor], str]]] = field(default_factory=dict)
    """The tensors that layers of a module have read, by the module's path."""

    def watch(self, site: Site, call: Call) -> None:
        """Note the weight of a linear layer, and the tensor that it reads."""
        name, place = site.weight or "", call.weight
        if place is None or name not in self.quantizers or call.operands[place].dim() != 2:
            return
        if name not in self.scales:
            rows = call.layouts[place].rows(call.operands[place].detach())
            scale = global_scale(self.quantizers[name], rows)
            if scale is None:
                return
            self.scales[name], self.groups[name] = scale, [name]
        read = call.operands[1 - place]
        others = self.readers.setdefault(name.rpartition(".")[0].rpartition(".")[0], [])
        for tensor, other in others:
            if tensor() is read and self.groups[other] is not self.groups[name]:
                self.groups[other] += self.groups[name]
                self.groups.update(dict.fromkeys(self.groups[name], self.groups[other]))
        others.append((ref(read), name))


@runtime_checkable
class HasGlobalScale(Protocol):
    """A quantizer of another plugin that takes part. A `Scheme` with scales in units of the tensor's needs nothing."""

    def global_scale(self, x: Tensor) -> float:
        """The number that the scales of `x` are in units of; it does not fall where values are added to `x`."""

    def at_global_scale(self, scale: float) -> Quantizer:
        """The same quantizer with this number in place of the tensor's own."""


def global_scale(quantizer: Any, rows: Tensor) -> float | None:
    """The scale of the scales of a weight, one for the whole tensor; None if the quantizer has no such scale."""
    if isinstance(quantizer, HasGlobalScale):
        return quantizer.global_scale(rows)
    inner = quantizer.scale if isinstance(quantizer, Scheme) else None
    if not isinstance(inner, Scheme) or inner.granularity != "tensor":
        return None
    exact = quantizer.measured(rows)[1]
    return float(inner.scales(exact).scale)


def at_global_scale(quantizer: Any, scale: float) -> Quantizer:
    """The quantizer with a given scale of its scales."""
    if isinstance(quantizer, HasGlobalScale):
        return quantizer.at_global_scale(scale)
    given = AtScale(element=quantizer.scale.element, scale=max(scale, torch.finfo(torch.float32).tiny))
    found: Quantizer = quantizer.replace(scale=given)
    return found


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [Fused]
