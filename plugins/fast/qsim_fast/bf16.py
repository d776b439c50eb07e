"""The bf16 arithmetic: operands that bfloat16 holds are multiplied in bfloat16 and added up in float32.

On a CPU the result is rounded to bfloat16, so this is exact only where the recipe rounds it so. The product is added up
in float32 and rounded once. A bias has to be added before that: it is three more columns of the operands, with its
upper, middle and lower bits. Only the order of summation differs from float32's. Subnormal products are flushed to
zero, so operands with too small values are refused.

A GPU gives the sums in float32, so the result may have any format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core.matmuls.call import LINEAR, Call
from qsim_core.matmuls.convolution import Convolution, ran
from qsim_core.matmuls.layout import Layout
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.sites.workspace import Memory, empty
from qsim_fast import quantizing
from qsim_fast.kernels.arguments import buffer
from qsim_fast.kernels.native import kernels_for
from qsim_fast.partial_execution import PartialLowering
from qsim_fast.quantizing import scheme_of
from qsim_fast.significands import (
    SMALLEST_SAFE,
    significand_bits_of,
    significand_bits_without_tensor_scale,
    smallest_magnitude,
)

SIGNIFICAND = 8
"""The bits of a bfloat16 significand, the hidden one included."""
PARTS = 3
"""The number of bfloat16 numbers that a float32 number is the sum of."""
TINIEST = torch.tensor(2.0**-133, dtype=torch.bfloat16)
ONES = torch.ones(1, PARTS, dtype=torch.bfloat16)


def fits(scheme: Any) -> bool:
    """Tell if bfloat16 holds the significands of a scheme's values. The exponents are checked with the values."""
    return significand_bits_of(scheme) <= SIGNIFICAND


def fits_factored(scheme: Any) -> bool:
    """Tell if bfloat16 holds the significands, or those of the values divided by their tensor scale (NVFP4)."""
    return fits(scheme) or significand_bits_without_tensor_scale(scheme) <= SIGNIFICAND


@dataclass(frozen=True)
class BFloat16Rows:
    """An operand's values in bfloat16, rows [..., K], or [..., K + PARTS] where a bias goes with them."""

    rows: Tensor
    wider: bool = False
    factor: Tensor | None = None
    """The tensor scale, by which the values are still to be multiplied."""
    exact: Callable[[], Tensor] | None = None
    """With a factor: a function that gives the reference's values, which are rounded more than once."""

    def by_heads(self, repeats: int) -> BFloat16Rows:
        """Turn [B, H, rows, columns] into [B * H * repeats, rows, columns]: heads of queries share one matrix."""
        return BFloat16Rows(heads_of(self.rows, repeats))

    def part(self, *place: slice) -> BFloat16Rows:
        """Take some of the matrices, of the rows and of the columns."""
        return BFloat16Rows(self.rows[place])

    def values(self) -> Tensor:
        """Compute the values in float32, without the columns for a bias."""
        if self.exact is not None:
            return self.exact()
        return (self.rows[..., :-PARTS] if self.wider else self.rows).float()


def heads_of(rows: Tensor, repeats: int) -> Tensor:
    """Turn [B, H, rows, columns] into [B * H * repeats, rows, columns]: heads of queries share one matrix."""
    return (rows if repeats == 1 else rows.repeat_interleave(repeats, 1)).contiguous().flatten(0, 1)


def bfloat16_rows(
    quantizer: Any, rows: Tensor, beside: Tensor | None = None, memory: Memory | None = None
) -> BFloat16Rows | None:
    """Quantize rows [..., K] to bfloat16, and put columns [rows or 1, PARTS] for a bias `beside` them.

    None if a product with a value may be flushed to zero.
    """
    rows = rows.detach()
    if not fits(scheme_of(quantizer)):
        values, factor = quantizing.without_tensor_scale(quantizer, rows)
        exact = functools.partial(quantizer.quantize, rows)
        return None if _flushed(quantizer, values) else BFloat16Rows(values, factor=factor, exact=exact)
    if beside is None:
        values = _rounded(quantizer, rows, None, memory)
        return None if _flushed(quantizer, values) else BFloat16Rows(values)
    length = rows.shape[-1]
    wide = empty(memory, rows.numel() // length, length + PARTS, dtype=torch.bfloat16, device=rows.device)
    _rounded(quantizer, rows, wide[:, :-PARTS])
    wide[:, -PARTS:] = beside
    return None if _flushed(quantizer, wide) else BFloat16Rows(wide.view(*rows.shape[:-1], -1), wider=True)


def _rounded(quantizer: Any, rows: Tensor, out: Tensor | None, memory: Memory | None = None) -> Tensor:
    """Quantize rows [..., K] in bfloat16, into `out` [rows, K] if there is one."""
    scheme, static = (
        scheme_of(quantizer),
        quantizer.scales(rows) if isinstance(quantizer, StaticScheme) else None,
    )
    if isinstance(scheme, Scheme):
        matrix = rows if out is None else rows.reshape(out.shape)
        if (fast := quantizing.quantize(scheme, matrix, static, torch.bfloat16, out, memory=memory)) is not None:
            return fast
    values: Tensor = quantizer.quantize(rows)
    narrow = values.to(torch.bfloat16)
    narrow = torch.where((narrow == 0) & (values != 0), TINIEST, narrow)  # `_flushed` sees that it is too small
    return narrow if out is None else out.copy_(narrow.reshape(out.shape))


def in_parts(bias: Tensor) -> Tensor | None:
    """Split a bias [N] into bfloat16 numbers [N, PARTS] whose sum it is; None if that is not exact."""
    parts, rest = [], bias.detach().float()
    for _ in range(PARTS):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return None if bool(rest.any()) else torch.stack(parts, -1)


def _flushed(quantizer: Any, values: Tensor) -> bool:
    """Tell if a non-zero value is so small that a product with it may be flushed to zero."""
    if smallest_magnitude(scheme_of(quantizer)) >= SMALLEST_SAFE:
        return False
    if (kernels := kernels_for(values.numel(), values.device)) is not None and _dense(values):
        return kernels.any_below(values, SMALLEST_SAFE)
    return bool(((values != 0) & (values.abs() < SMALLEST_SAFE)).any())


def _dense(x: Tensor) -> bool:
    """Tell if memory holds the values of `x` one after another, in any order of the axes."""
    order = sorted(range(x.dim()), key=lambda axis: (x.stride(axis), x.shape[axis]), reverse=True)
    return x.permute(order).is_contiguous()


def linear(x: BFloat16Rows, weight: BFloat16Rows, bias: Tensor | None) -> Tensor | None:
    """Multiply rows [..., K] by the rows of a weight [N, K], and add a bias [N]; None if that is not exact.

    The result is rounded to bfloat16 once, and comes in float32.
    """
    if bias is not None:
        if (parts := in_parts(bias)) is None:
            return None
        rows = weight.rows
        if rows.is_inference() and not torch.is_inference_mode_enabled():
            rows = rows.clone()
        rows[:, -PARTS:] = parts
        return F.linear(x.rows, rows).float()
    return F.linear(x.rows, weight.rows).float()


def unrounded(call: Call, first: BFloat16Rows, second: BFloat16Rows) -> Tensor:
    """Multiply two operands on a GPU, and add a bias, in float32."""
    factors = [operand.factor for operand in (first, second) if operand.factor is not None]
    linear = call.function in LINEAR
    left, right = first.rows, second.rows.T if linear else call.layouts[1].back(second.rows)
    if right.dim() > 2:
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        left, right = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (left, right))
        y: Tensor = torch.bmm(left, right, out_dtype=torch.float32).unflatten(0, batch)
    else:
        matrix = left.reshape(-1, left.shape[-1])
        y = torch.mm(matrix, right, out_dtype=torch.float32).unflatten(0, left.shape[:-1])
    for factor in factors:  # one by one: the product of both may underflow or overflow
        y = y.mul_(factor)
    return y.add_(call.bias) if linear and call.bias is not None else y


def matmul(layouts: Sequence[Layout], first: BFloat16Rows, second: BFloat16Rows) -> Tensor:
    """Multiply two operands. The result is rounded to bfloat16 once, and comes in float32."""
    left, right = (layout.back(operand.rows) for layout, operand in zip(layouts, (first, second), strict=True))
    return torch.matmul(left, right).float()


class BF16Product(PartialLowering):
    """A product of operands in bfloat16. With `biased` they have columns for the bias."""

    arithmetic = "bf16"

    def __init__(self, quantizers: Sequence[Any], biased: bool, rounds: bool = True) -> None:
        super().__init__(quantizers)
        self.biased, self._rounds = biased and rounds, rounds

    @property
    def rounds(self) -> bool:
        """True if the product comes rounded to bfloat16, the output's format."""
        return self._rounds

    @property
    def key(self) -> tuple[Any, ...]:
        return self.arithmetic, self.biased

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> BFloat16Rows | None:
        return bfloat16_rows(self.quantizers[place], rows, ONES if self.biased else None, memory)

    def new(self, rows: Tensor) -> BFloat16Rows | None:
        made = bfloat16_rows(self.quantizers[1], rows, ONES if self.biased else None)
        tiny = made is not None and made.factor is not None and float(made.factor) < SMALLEST_SAFE
        return None if tiny else made  # the values would be subnormal, and could not be made again

    def again(self, rows: Tensor, kept: bool | Tensor) -> BFloat16Rows | None:
        """Make the form again of values that were found exact before."""
        if isinstance(kept, Tensor):
            return BFloat16Rows(quantizing.divided_by_tensor_scale(kept, rows), factor=kept)
        if not self.biased:
            return BFloat16Rows(rows.to(torch.bfloat16))
        wide = buffer(len(rows), rows.shape[1] + PARTS, dtype=torch.bfloat16)
        wide[:, :-PARTS].copy_(rows)
        return BFloat16Rows(wide, wider=True)

    def part(self, layouts: Sequence[Layout], first: BFloat16Rows, second: BFloat16Rows, memory: Memory) -> Tensor:
        """Multiply rows [heads, R, K] and [heads, N, K]: rounded to bfloat16, in float32."""
        left, right = first.rows, layouts[1].back(second.rows)
        shape = *left.shape[:-1], right.shape[-1]
        product = torch.bmm(left, right, out=memory.workspace.empty(memory.use, shape, left.dtype))
        return memory.workspace.empty(memory.use, shape).copy_(product)

    def pinned(self, rows: Tensor, scales: Any) -> BFloat16Rows | None:
        made = self.again(rows, True) if fits(scheme_of(self.quantizers[1])) else None
        return None if made is None or _flushed(self.quantizers[1], rows.to(torch.bfloat16)) else made

    def keep(self, made: BFloat16Rows) -> bool | Tensor:
        return True if made.factor is None else made.factor

    def product(self, call: Call, first: BFloat16Rows, second: BFloat16Rows) -> Tensor | None:
        bias = call.bias if call.function in LINEAR else None
        if not self.rounds:
            return unrounded(call, first, second)
        return linear(first, second, bias) if call.function in LINEAR else matmul(call.layouts, first, second)


class BF16Convolution(BF16Product):
    """A convolution in bfloat16. Its bias is three more channels, at a tap that always lies inside the image."""

    def new(self, rows: Tensor) -> BFloat16Rows | None:
        return bfloat16_rows(self.quantizers[1], rows)

    def again(self, rows: Tensor, kept: bool | Tensor) -> BFloat16Rows | None:
        return BFloat16Rows(rows.to(torch.bfloat16))

    def product(self, call: Call, first: BFloat16Rows, second: BFloat16Rows) -> Tensor | None:
        image, kernel = (layout.back(x.rows) for layout, x in zip(call.layouts, (first, second), strict=True))
        if call.bias is not None:
            tap, parts = tap_inside(Convolution.of(call)), in_parts(call.bias)
            if tap is None or parts is None:
                return None
            kernel = F.pad(kernel, [0, 0] * len(tap) + [0, PARTS])
            place: Any = slice(None), slice(-PARTS, None), *tap
            kernel[place] = parts
        return ran(call, image, kernel).to(torch.float32, memory_format=torch.contiguous_format)


def tap_inside(over: Convolution) -> tuple[int, ...] | None:
    """The index of a tap that is never multiplied with a zero beside the image; None if there is no such tap."""
    found = []
    dimensions = zip(over.taps, over.sides, over.dilation, over.stride, over.shape, over.sizes, strict=True)
    for taps, (before, _), reach, step, count, size in dimensions:
        positions = [tap * reach - before for tap in range(taps)]  # of each tap, for the first value of the result
        inside = [tap for tap, position in enumerate(positions) if 0 <= position < size - (count - 1) * step]
        if not inside:
            return None
        found.append(inside[0])
    return tuple(found)
