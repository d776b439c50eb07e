"""SmoothQuant: `smoothquant(alpha=0.5)` moves the range of activations into the weights that read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from qsim_structure import NormGroup
from qsim_structure.for_transforms import scale_group, structure_of
from torch import Tensor, nn

from qsim_core import Transform, hookimpl
from qsim_core.transforms.context import Context
from qsim_core.transforms.offload import editing

PRESETS: dict[str, tuple[float, float]] = {
    "mit": (1e-5, float("inf")),
    "llmc": (0.0, float("inf")),
    "modelopt": (1e-4, 1e4),
}
"""The bounds between which each project clamps its factors."""


class SmoothQuant(Transform):
    """Divides each norm's channels by s and multiplies the columns that read them by s; the function stays.

    s = max|X|^alpha / max|W|^(1 - alpha), channel by channel: X the norm's output over the calibration data, W all
    weights that read it, their maxima clamped at 1e-5 and s from below at 1e-5. Source: arXiv 2211.10438, equation 4,
    as mit-han-lab/smoothquant computes it. Norms are folded wherever the model's structure allows it, with whatever
    reads them (q, k and v; gate and up; routers and experts); a norm that is left alone is reported with the reason.

    `preset` names another project's formula: `llmc` takes max - min of X and twice max|W| (llm-compressor), `modelopt`
    clamps s to 1e-4 … 1e4. Their granularity, one s for each linear, is not imitated.
    """

    name = "smoothquant"
    alpha: float = Field(0.5, ge=0, le=1, description="how much of the range is moved: 0 none, 1 all of it")
    preset: Literal["mit", "llmc", "modelopt"] = Field("mit", description="whose formula")

    def apply(self, model: nn.Module, context: Context) -> None:
        """Fold every norm group that a quantizer of the recipe touches. Raises `DataError` without calibration data."""
        quantized = {s.weight for s in context.sites.table.values() if s.plan.weight or s.plan.input}
        structure = structure_of(context, "groups")
        groups = [group for group in structure.groups if quantized & set(group.weights)]
        for refused in structure.refused:
            if ("norm" in refused.name or "ln" in refused.name) and not refused.name.endswith(".weight"):
                context.report(refused.name, note=f"left alone: {'; '.join(refused.reasons)}")
        ranges = _ranges(model, context, groups)
        for group in groups:
            with context.timed() as seconds:
                low, high = ranges[group.norm]
                largest = torch.maximum(low.abs(), high.abs())
                factors = self.factors(low, high, _column_maxima(model, group))
                scale_group(model, group, factors)
                context.report(
                    group.norm,
                    before=_unevenness(largest),
                    after=_unevenness(largest / factors),
                    measure="largest channel over the median one",
                    seconds=seconds(),
                )

    def factors(self, low: Tensor, high: Tensor, weights: Tensor) -> Tensor:
        """s for each channel [C], from the lowest and highest activation and the largest |weight| of each."""
        lowest, highest = PRESETS[self.preset]
        if self.preset == "llmc":
            activations, weights = high - low, 2 * weights
        else:
            activations = torch.maximum(low.abs(), high.abs())
        moved = activations.clamp(min=1e-5) ** self.alpha / weights.clamp(min=1e-5) ** (1 - self.alpha)
        return moved.clamp(lowest, highest)


def _ranges(model: nn.Module, context: Context, groups: list[NormGroup]) -> dict[str, tuple[Tensor, Tensor]]:
    """The lowest and the highest value of each channel of each norm, [C] each, in one pass over the data."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def record(group: NormGroup) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            axis = 1 if isinstance(module, nn.GroupNorm) else output.dim() - 1
            rows = output.detach().movedim(axis, -1).reshape(-1, group.size)
            low, high = (extreme.double().cpu() for extreme in (rows.amin(0), rows.amax(0)))
            if group.norm in found:
                low, high = torch.minimum(found[group.norm][0], low), torch.maximum(found[group.norm][1], high)
            found[group.norm] = low, high

        return hook

    handles = [model.get_submodule(group.norm).register_forward_hook(record(group)) for group in groups]
    try:
        context.observe(lambda site, call: None, "smoothquant")
    finally:
        for handle in handles:
            handle.remove()
    return found


def _column_maxima(model: nn.Module, group: NormGroup) -> Tensor:
    """The largest |weight| that reads each channel, over all weights that do; float64 [C]."""
    largest = torch.zeros(group.size, dtype=torch.float64)
    for use in group.uses:
        with editing(model, use.weight) as parameters:
            columns = parameters[use.weight].movedim(use.axis, -1)
            columns = columns.reshape(-1, columns.shape[-1])
            columns = torch.maximum(-columns.amin(0), columns.amax(0)).double().cpu()
        read = use.channels >= 0
        largest.scatter_reduce_(0, use.channels[read], columns[read], "amax")
    return largest


def _unevenness(largest: Tensor) -> float:
    return float(largest.max() / largest.median().clamp(min=1e-30))


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [SmoothQuant]
