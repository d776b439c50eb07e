"""Scales of weights by their inputs: `imatrix()` weighs errors by E[x²], `local_hessian` by E[x xᵀ] of each block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from qsim_core import Calibrator, Preset, RecipeError, Scheme, Transform, hookimpl, parse
from qsim_core.formats.rounding import working
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, layout_of
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.quantized_weights import READ
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context, MatmulWeight
from qsim_core.transforms.offload import editing


@dataclass
class Moments:
    """Sums of products of the inputs of one weight: Σ x² [K], or Σ x xᵀ [B, n, n] for each block of n columns."""

    layout: Layout
    total: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Count inputs [..., K] in."""
        x = working(x.detach()).reshape(-1, x.shape[-1])
        if self.total.dim() == 1:
            self.total += x.square().sum(0)
        else:
            n = self.total.shape[-1]
            blocks = F.pad(x, (0, -x.shape[-1] % n)).unflatten(-1, (-1, n))
            self.total += torch.einsum("tbn,tbm->bnm", blocks, blocks)
        self.count += len(x)

    def weighing(self, scheme: Scheme, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """Give the function that maps errors [..., B, n] of the blocks of `rows` so that squares of them add up."""
        mean = self.total / self.count
        if mean.dim() == 1:
            weights = scheme.split(mean.sqrt().expand_as(rows))
            return lambda error: error * weights
        values, vectors = torch.linalg.eigh(mean)
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT  # the symmetric root of E[x xᵀ]
        return lambda error: torch.einsum("...bn,bnm->...bm", error, root)


class IMatrix(Transform):
    """Chooses the scales of a weight so that its products with calibration data change least, and rounds it.

    The calibrator `range` compares ranges by these errors e = Q(w) - w of a block, in place of Σ |e|²:

        diagonal   Σ E[x²] e²           over the columns; llama.cpp's imatrix, llm-compressor's `imatrix_mse`
        local      eᵀ E[x xᵀ] e         with the products of the block's own columns; ModelOpt's `local_hessian`

    Without `range` the weight's own calibrator tries ranges, such as `four_over_six`, or `mse(norm=2)` if that one
    compares no errors. The inputs x are those of the model before quantization. The weights are pinned: a later
    transform leaves them.
    """

    name = "imatrix"
    hessian: Literal["diagonal", "local"] = Field("diagonal", description="the products of inputs that weigh errors")
    range: Calibrator | None = Field(
        None, description="tries ranges; none: the weight's own if it compares errors, else mse(norm=2)"
    )

    def apply(self, model: nn.Module, context: Context) -> None:
        """Round and pin the weights of linears, in one pass. Raises `DataError` without calibration data."""
        wanted: dict[str, MatmulWeight] = {}
        for weight in context.weights():
            if reason := self._why_left_alone(weight, context):
                context.report(weight.name, note=f"left alone: {reason}")
            else:
                wanted[weight.name] = weight
        found: dict[str, Moments] = {}

        def watch(site: Site, call: Call) -> None:
            weight, place = wanted.get(site.weight or ""), call.weight
            if weight is None or place is None or site.op.startswith("conv") or site.op == "einsum":
                return
            operand, parameter = call.operands[place], weight.parameter
            layout = layout_of(parameter, operand, call.layouts[place])
            if layout is not None and parameter.dim() == 2 and operand.numel() == parameter.numel():
                if weight.name not in found:
                    found[weight.name] = Moments(layout, self._zeros(cast(Scheme, weight.quantizer), call.input))
                found[weight.name].add(call.input)

        context.observe(watch, "imatrix")
        for name, weight in wanted.items():
            if name not in found or not found[name].count:
                context.report(name, note="left alone: no calibration sample reached it in a linear layer")
                continue
            count, size = found[name].count, found[name].total.shape[-1]
            if self.hessian == "local" and count < size:
                few = f"saw {count} tokens, fewer than the {size} columns of its blocks: give more samples"
                context.warn(weight.site.name, few)
            self._round(model, context, weight, found[name])

    def _why_left_alone(self, weight: MatmulWeight, context: Context) -> str | None:
        """Return the reason why the scales of a weight cannot be chosen; None if they can."""
        state, quantizer = context.sites.weights, weight.quantizer
        if weight.name in state.pinned:
            return "it lies on its grid already"
        if weight.name in state.tied:
            return "it is tied to another parameter, which would change with it"
        if READ in state.uses.get(weight.name, ()) or len(state.uses.get(weight.name, ())) > 1:
            return "it is used in another way too"
        if not isinstance(quantizer, Scheme) or quantizer.learns:
            return f"{quantizer} has no scales to choose"
        if self.hessian == "local" and (isinstance(quantizer.granularity, tuple) or quantizer.granularity == "tensor"):
            return f"{quantizer} shares scales over rows; hessian=diagonal allows that"
        return None

    def _zeros(self, scheme: Scheme, x: Tensor) -> Tensor:
        """Make the sums of the moments of inputs [..., K], at their start."""
        columns = x.shape[-1]
        if self.hessian == "diagonal":
            return working(x).new_zeros(columns)
        n = min(scheme.granularity, columns) if isinstance(scheme.granularity, int) else columns
        return working(x).new_zeros(-(-columns // n), n, n)

    def _round(self, model: nn.Module, context: Context, weight: MatmulWeight, moments: Moments) -> None:
        with editing(model, weight.name) as parameters, context.timed() as seconds:
            parameter = parameters[weight.name]
            rows = working(moments.layout.rows(parameter.detach()))
            scheme = cast(Scheme, weight.quantizer)
            weigh = moments.weighing(scheme, rows)
            compared = False

            def seen(error: Tensor) -> Tensor:
                nonlocal compared
                compared = True
                return weigh(error)

            for tried in [scheme.range, parse("mse(norm=2)")] if self.range is None else [self.range]:
                scheme = scheme.replace(range=tried)
                scale, zero = scheme.scale_map(rows, seen)
                if compared:
                    break
            else:
                raise RecipeError(f"{self}: {self.range} does not compare the errors of ranges; mse does")
            rounded = scheme.round_at(rows, scale, zero)
            energies = [
                float(weigh(scheme.split(part)).double().square().sum())
                for part in (rows, weight.quantizer.quantize(rows) - rows, rounded - rows)
            ]
            of_scales = scheme.scales_of_scales(rows)  # `rows` may lie in the memory of the parameter
            parameter.copy_(moments.layout.back(rounded))
            context.pin(weight, _by_block(scheme, Scales(scale, zero)), _by_block(scheme, of_scales))
        whole, before, after = energies
        context.report(
            weight.name,
            before=(before / whole) ** 0.5 if whole else 0.0,
            after=(after / whole) ** 0.5 if whole else 0.0,
            measure="relative error of the outputs",
            seconds=seconds(),
        )


def _by_block(scheme: Scheme, each: Scales | None) -> Scales | None:
    """Take the scales of blocks, [N, B], from those of each element of rows [N, K]."""
    if each is None:
        return None
    shared = scheme.granularity[1] if isinstance(scheme.granularity, tuple) else scheme.granularity
    step = shared if isinstance(shared, int) else each.scale.shape[-1]
    return Scales(each.scale[..., ::step], None if each.zero is None else each.zero[..., ::step])


@hookimpl
def qsim_transforms() -> list[type[Transform] | Preset]:
    return [IMatrix, Preset("local_hessian", "imatrix(hessian=local)", "scales by E[x xᵀ] of each block: ModelOpt's")]
