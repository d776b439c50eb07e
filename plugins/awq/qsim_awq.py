"""AWQ: `awq()` scales up the channels that matter before weights are rounded, and clips weights where that helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from qsim_structure import NormGroup, Structure, Use, WeightPair
from qsim_structure.for_transforms import scale_group, scale_pair, structure_of
from torch import Tensor, nn

from qsim_core import Scheme, Transform, hookimpl
from qsim_core.errors import natural_order
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, layout_of
from qsim_core.sites.site import Site
from qsim_core.transforms.blocks import Block
from qsim_core.transforms.context import Context, MatmulWeight


@dataclass
class Layer:
    """A weight, and what it was multiplied with: Σ x xᵀ [K, K] and Σ |x| [K] over `tokens` inputs x."""

    weight: MatmulWeight
    layout: Layout
    gram: Tensor
    magnitude: Tensor
    tokens: int = 0

    @property
    def rows(self) -> Tensor:
        """A copy of the weight as it is now, [..., N, K], in float32."""
        return self.layout.rows(self.weight.parameter.detach()).to(torch.float32, copy=True)

    def add(self, x: Tensor) -> None:
        """Count inputs [..., K] in."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.gram += x.T @ x
        self.magnitude += x.abs().sum(0)
        self.tokens += len(x)

    def divide(self, columns: Tensor) -> None:
        """Divide the inputs by `columns` [K] from now on."""
        columns = columns.to(self.gram)
        self.gram /= columns[:, None] * columns
        self.magnitude /= columns

    def error(self, change: Tensor) -> float:
        """Compute |X Δᵀ|² for a change Δ [..., N, K] of the rows."""
        return float(((change @ self.gram) * change).sum())


class AWQ(Transform):
    """Multiplies the columns of weights by s and divides what makes the channels by s; then clips weights.

    s = mean|x|^α / √(max s · min s), channel by channel. Each α of 0, 1/grid, 2/grid, … is tried. The one with the
    least error |X (Q(W s)/s - W)ᵀ|² is taken, over all weights that read the channels; Q is the recipe's quantizer.
    With `clip` the largest magnitude of each block is then cut to a share of it. The shares 1, 1 - 1/grid, … down to
    a half are tried, and the one with the block's least error is taken. Source: AWQ (arXiv 2306.00978), equations 4
    and 5, and the search of its reference.

    Scales are folded where the model's structure allows it, into norms and into weights before a linear or a ReLU.
    Norms and weights that are not scaled are reported with the reason. The README lists the differences from the
    reference.
    """

    name = "awq"
    grid: PositiveInt = Field(20, description="candidates for α; and 1/grid is the step from one share to the next")
    clip: bool = Field(True, description="clip weights too, except those of q and k")

    def apply(self, model: nn.Module, context: Context) -> None:
        """Scale and clip block by block. Raises `DataError` without calibration data."""
        state = context.sites.weights
        fixed = {*state.tied, *state.pinned, *(name for name, uses in state.uses.items() if len(uses) > 1)}
        weights = {weight.name: weight for weight in context.weights() if weight.name not in fixed}
        structure = structure_of(context, "groups", "pairs")
        found: list[NormGroup | WeightPair] = [*structure.groups, *(pair for pair in structure.pairs if pair.scales)]
        foldable = [item for item in found if not weights.keys().isdisjoint(item.weights)]
        for name in (weight.name for weight in context.weights() if weight.name in state.pinned):
            context.report(name, note="left alone: it lies on its grid already")
        for refused in structure.refused:
            context.report(refused.name, note=f"not scaled: {'; '.join(refused.reasons)}")
        left = {_maker(item) for item in foldable}
        for block in context.blocks():
            layers = _observe(block, weights)
            for item in foldable:
                uses = [use for use in item.uses if use.weight in weights]
                if all(use.weight in layers for use in uses):
                    self._scale(model, context, item, uses, layers)
                    left.discard(_maker(item))
            for layer in layers.values() if self.clip else ():
                if layer.weight.name not in _makers_of_scores(structure):
                    self._clip(context, layer)
        left -= {report.layer for report in context.reports if report.after is not None}
        for name in sorted(left, key=natural_order):
            context.report(name, note="not scaled: what reads it is not a linear, or lies outside of every block")

    def _scale(
        self,
        model: nn.Module,
        context: Context,
        item: NormGroup | WeightPair,
        uses: Sequence[Use],
        layers: dict[str, Layer],
    ) -> None:
        with context.timed() as seconds:
            mean = _mean_magnitude(item.size, uses, layers)
            candidates = [_factors(mean, step / self.grid) for step in range(self.grid)]
            errors = [sum(_error(layers[use.weight], _read(s, use)) for use in uses) for s in candidates]
            signal = sum(layers[use.weight].error(layers[use.weight].rows) for use in uses)
            best = min(range(self.grid), key=errors.__getitem__)
            fold = scale_group if isinstance(item, NormGroup) else scale_pair
            fold(model, item, candidates[best])  # type: ignore[arg-type]
            for use in uses:
                layers[use.weight].divide(_read(candidates[best], use))
            context.report(
                _maker(item),
                before=(errors[0] / signal) ** 0.5 if signal else 0.0,
                after=(errors[best] / signal) ** 0.5 if signal else 0.0,
                measure="relative error of what reads it",
                seconds=seconds(),
                note=f"α = {best / self.grid:g}",
            )

    def _clip(self, context: Context, layer: Layer) -> None:
        quantizer = layer.weight.quantizer
        if not isinstance(quantizer, Scheme) or not isinstance(quantizer.granularity, int | str):
            return  # no blocks along the rows to clip one by one
        with context.timed() as seconds:
            rows, gram = layer.rows, layer.gram
            blocks = _along_rows(rows, quantizer)
            size = blocks.shape[-1]
            short = -gram.shape[-1] % size
            inside = F.pad(gram, (0, short, 0, short)).unflatten(0, (-1, size)).unflatten(2, (-1, size))
            inside = inside.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [B, n, n]
            largest = blocks.abs().amax(-1, keepdim=True)
            least, best = torch.full_like(largest, torch.inf), torch.ones_like(largest)
            for step in range(self.grid // 2):
                limit = (1 - step / self.grid) * largest
                cut = blocks.clamp(-limit, limit).flatten(-2)[..., : rows.shape[-1]]
                change = _along_rows(quantizer.quantize(cut) - rows, quantizer)
                error = (torch.einsum("...bn,bnm->...bm", change, inside) * change).sum(-1, keepdim=True)
                least, best = torch.minimum(error, least), torch.where(error < least, limit / largest, best)
            before, signal = layer.error(quantizer.quantize(rows) - rows), layer.error(rows)
            limit = torch.where(largest > 0, best * largest, 0.0)
            cut = blocks.clamp(-limit, limit).flatten(-2)[..., : rows.shape[-1]]
            layer.weight.parameter.copy_(layer.layout.back(cut))
            context.report(
                layer.weight.name,
                before=(before / signal) ** 0.5 if signal else 0.0,
                after=(layer.error(quantizer.quantize(cut) - rows) / signal) ** 0.5 if signal else 0.0,
                measure="relative error of the outputs",
                seconds=seconds(),
            )


def _observe(block: Block, weights: dict[str, MatmulWeight]) -> dict[str, Layer]:
    """The quantized weights of linears that a block runs, with what they are multiplied with."""
    layers: dict[str, Layer] = {}

    def watch(site: Site, call: Call) -> None:
        weight = weights.get(site.weight or "")
        if weight is None or site.op.startswith("conv") or site.op == "einsum":
            return
        place = call.weight or 0
        x, layout = call.input, layout_of(weight.parameter, call.operands[place], call.layouts[place])
        if layout is None or not len(x):
            return
        if weight.name not in layers:
            zeros = x.new_zeros(x.shape[-1], dtype=torch.float32)
            layers[weight.name] = Layer(weight, layout, zeros.new_zeros(len(zeros), len(zeros)), zeros)
        layers[weight.name].add(x)

    block.observe(watch)
    return layers


def _mean_magnitude(size: int, uses: Sequence[Use], layers: dict[str, Layer]) -> Tensor:
    """mean|x| of each channel, over all that read it: [size]."""
    total = torch.zeros(2, size)
    for use in uses:
        layer, read = layers[use.weight], use.channels >= 0
        seen = torch.stack([layer.magnitude / layer.tokens, torch.ones_like(layer.magnitude)]).cpu()
        total.index_add_(1, use.channels[read], seen[:, read])
    return total[0] / total[1].clamp(min=1)


def _factors(mean: Tensor, alpha: float) -> Tensor:
    """mean^α, clamped at 1e-4 and divided by √(max · min), as the reference does."""
    powers = mean.pow(alpha).clamp(min=1e-4)
    return powers / (powers.max() * powers.min()).sqrt()


def _read(factors: Tensor, use: Use) -> Tensor:
    """The factor of each column of a weight: 1 where it reads none of the channels."""
    return torch.where(use.channels >= 0, factors[use.channels.clamp(min=0)], 1.0)


def _error(layer: Layer, columns: Tensor) -> float:
    rows, columns = layer.rows, columns.to(layer.gram)
    return layer.error(layer.weight.quantizer.quantize(rows * columns) / columns - rows)


def _along_rows(rows: Tensor, quantizer: Scheme) -> Tensor:
    """Rows [..., K] as [..., B, n]: blocks that share a scale; a row is one block where it shares it with others."""
    return quantizer.split(rows) if isinstance(quantizer.granularity, int) else rows.unsqueeze(-2)


def _maker(item: NormGroup | WeightPair) -> str:
    return item.norm if isinstance(item, NormGroup) else item.producer


def _makers_of_scores(structure: Structure) -> set[str]:
    """The weights that make q and k: clipping them is known to hurt (the reference leaves them out too)."""
    made = [projection for a in structure.attention for projection in (a.query, a.key) if projection is not None]
    return {projection.producer for projection in made}


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [AWQ]
