"""The weights of a model that may be mapped along their reduction axis, with the inputs of their matmuls."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from qsim_structure import Structure
from qsim_structure.for_transforms import scale_group, structure_of
from torch import Tensor, nn

from qsim_core import RecipeError, Transform
from qsim_core.formats.quantizer import Quantizer
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, layout_of
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context
from qsim_core.transforms.offload import editing
from qsim_hadamard.maps import Map
from qsim_hadamard.matrices import unknown


def _size(value: Any) -> Any:
    if value in ("whole", "block") or (type(value) is int and value > 1):
        return value
    raise ValueError(f"a size is whole, block, or a whole number from 2 on, not {value!r}")


Size = Annotated[Literal["whole", "block"] | int, BeforeValidator(_size)]
"""The number of elements that are mapped together: all of the axis, those that share a scale, or so many."""


@dataclass(frozen=True)
class Rotatable:
    """A weight that may be mapped along its reduction axis, of `length`, in blocks of `size`."""

    name: str
    site: Site
    layout: Layout
    length: int
    size: int

    def turn(self, model: nn.Module, context: Context, change: Map) -> None:
        """Map the weight once, and the input in each forward."""
        with self.reported(model, context), editing(model, self.name) as parameters:
            parameters[self.name].copy_(self.changed(change, parameters[self.name].double()))
        self.site.rotations["input"] = change

    def changed(self, change: Map, values: Tensor) -> Tensor:
        """Compute the mapped values of the weight."""
        return self.layout.back(change.of_weight(self.layout.rows(values)))

    @contextmanager
    def reported(self, model: nn.Module, context: Context, note: str = "") -> Iterator[None]:
        """Report the largest weight before and after what is done inside."""
        with context.timed() as seconds:
            before = self.peak(model)
            yield
            self.report(context, before, self.peak(model), note, seconds())

    def report(self, context: Context, before: float, after: float, note: str = "", seconds: float = 0.0) -> None:
        """Report the `peak` before and after."""
        measure = "largest weight over the root mean square"
        context.report(self.name, before=before, after=after, measure=measure, seconds=seconds, note=note)

    def peak(self, model: nn.Module) -> float:
        """The largest weight over the root mean square."""
        with editing(model, self.name) as parameters:
            rows = parameters[self.name]
            return float(rows.abs().max() / rows.double().square().mean().sqrt()) if rows.numel() else 0.0


@dataclass(frozen=True)
class Survey:
    """The weights that may be mapped, and the length of a row of each product, by the name of its site."""

    weights: dict[str, Rotatable]
    lengths: dict[str, int]

    def size_behind(self, name: str) -> int | None:
        """The size in which a weight's input is rotated; None: it is not."""
        return self.weights[name].size if name in self.weights else None


def survey(transform: Transform, size: Size, model: nn.Module, context: Context) -> Survey:
    """Find every weight that is quantized, or whose input is, and may be mapped; the others are reported, with reasons.

    Raises `RecipeError` after a transform that has put such a weight on its grid. So does a size that does not divide
    its inputs.
    """
    planned = [site for site in context.all_sites if site.weight and (site.plan.weight or site.plan.input)]
    if settled := sorted(context.sites.weights.pinned & {site.weight for site in planned}):
        raise RecipeError(
            f"{transform} would change {settled[0]}, which an earlier transform has put on its grid; "
            f"put {transform} before that one"
        )
    structure = structure_of(context)
    seen: dict[str, list[Layout | None]] = defaultdict(list)
    lengths: dict[str, int] = {}

    def watch(site: Site, call: Call) -> None:
        if call.weight is not None and site.weight is not None and not site.op.startswith("conv"):
            operand, layout = call.operands[call.weight], call.layouts[call.weight]
            seen[site.name].append(layout_of(model.get_parameter(site.weight), operand, layout))
        lengths[site.name] = call.layouts[0].rows(call.operands[0]).shape[-1]

    context.look(watch)
    found: dict[str, Rotatable] = {}
    for site in planned:
        name = site.weight or ""
        layouts = seen[site.name]
        reason = _reason(site, layouts, context, structure)
        if reason is None and layouts[0] is not None:
            length = layouts[0].rows(model.get_parameter(name)).shape[-1]
            along = length_along(size, length, _quantizers(site))
            reason = _no_size(site) if along is None else unknown(along)
            if size == "block" and along is not None and length % along:
                reason = f"its formats' blocks of {along} do not divide its {length} inputs"
            if reason is None and along is not None:
                found[name] = Rotatable(name, site, layouts[0], length, along)
        if reason is not None:
            context.report(name, note=f"left alone: {reason}")
    _check_divides(transform, list(found.values()))
    _warn_without_scales(found.values(), context)
    return Survey(found, lengths)


def length_along(size: Size, length: int, quantizers: Iterable[Quantizer | None]) -> int | None:
    """The number of elements that are mapped together of a row of `length`; None: no quantizer has blocks along it.

    `block` is the greatest common divisor of the quantizers' blocks. A block that is longer than the row is the row.
    """
    if size == "whole":
        return length
    if size != "block":
        return size
    along = [quantizer.granularity for quantizer in quantizers if quantizer is not None]
    blocks = [block[1] if isinstance(block, tuple) else block for block in along]
    sizes = [min(block, length) for block in blocks if isinstance(block, int)]
    return reduce(math.gcd, sizes) if sizes else None


def fold_norms(model: nn.Module, found: Survey, context: Context) -> None:
    """Move the weights of norms into the weights that read them, where one of these is mapped."""
    for group in structure_of(context).groups:
        if found.weights.keys().isdisjoint(group.weights):
            continue
        with editing(model, f"{group.norm}.weight") as parameters:
            factors = parameters[f"{group.norm}.weight"].double() + group.offset
        if bool((factors.abs() > 1e-6 * factors.abs().max()).all()):
            scale_group(model, group, factors)
        else:
            context.report(group.norm, note="its weight stays: it switches channels off")


def free(name: str, context: Context) -> bool:
    """Tell if a weight may be changed: it is not on its grid, not tied, and used in one way."""
    weights = context.sites.weights
    return name not in weights.pinned | weights.tied and len(weights.uses.get(name, ())) == 1


def _check_divides(transform: Transform, weights: Sequence[Rotatable]) -> None:
    """Raise `RecipeError` if a size does not divide the length of a weight's rows."""
    bad = next((weight for weight in weights if weight.length % weight.size), None)
    if bad is not None:
        common = reduce(math.gcd, (weight.length for weight in weights))
        choice = f"choose a size that divides {common}, as all inputs are multiples of it, or " if common > 1 else ""
        raise RecipeError(
            f"{transform}: {bad.size} does not divide the {bad.length} inputs of {bad.name}; "
            f"{choice}leave the layer out by skip"
        )


def _warn_without_scales(weights: Iterable[Rotatable], context: Context) -> None:
    """Say beside the result where a map can hardly help: no values share a scale that an outlier could spoil."""
    alone = [weight for weight in weights if all(q.granularity == "element" for q in _quantizers(weight.site))]
    if alone:
        formats = " and ".join(dict.fromkeys(map(str, _quantizers(alone[0].site))))
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        context.warn(f"{alone[0].name}{more}", f"has no scales: under {formats} only values out of range gain")


def _quantizers(site: Site) -> list[Quantizer]:
    return [quantizer for quantizer in (site.plan.weight, site.plan.input) if quantizer is not None]


def _no_size(site: Site) -> str:
    formats = " and ".join(dict.fromkeys(map(str, _quantizers(site))))
    return f"{formats} has no blocks along the rows; say a size"


def _reason(site: Site, seen: list[Layout | None], context: Context, structure: Structure) -> str | None:
    """The reason why a weight cannot be mapped along its reduction axis; None: it can."""
    weights = context.sites.weights
    if site.op.startswith("conv"):
        return "a convolution"
    if site.weight in weights.tied or len(weights.uses[site.weight or ""]) > 1:
        return "it is tied, or used in two ways"
    if readers := structure.readers.get(site.weight or ""):
        return f"it is also read by {', '.join(readers)}"
    if site.rotations:
        return "its input is rotated already"
    if not seen or seen[0] is None or any(layout is None or layout.name != seen[0].name for layout in seen):
        return "it is used in parts"
    return None
