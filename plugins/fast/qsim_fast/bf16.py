"""The bf16 path: values that are bfloat16's, multiplied as such where the result is rounded to bfloat16 in any case.

One matmul accumulates in float32 and rounds once. A bias goes through it, as three more columns that hold its upper,
middle and lower bits: added afterwards it would meet a result that is rounded already. Only the order of summation
differs from the float32 path's; products that would be subnormal are flushed to zero, so such operands are refused..

A GPU gives the sums in float32, whatever they are rounded to afterwards, if anything.
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
from qsim_core.quantizers.static_scale import StaticScheme, scheme_of
from qsim_core.sites.arithmetic import Lowering
from qsim_core.sites.workspace import Memory, empty
from qsim_fast import quantizing
from qsim_fast.kernels.interface import buffer
from qsim_fast.kernels.native import library
from qsim_fast.significands import SMALLEST, significand_factored, significand_of, smallest_of

SIGNIFICAND = 8
"""Bits of bfloat16's, the hidden one counted."""
PARTS = 3
"""A float32 number is the sum of so many bfloat16 numbers."""
TINIEST = torch.tensor(2.0**-133, dtype=torch.bfloat16)
ONES = torch.ones(1, PARTS, dtype=torch.bfloat16)


def fits(scheme: Any) -> bool:
    """Whether a scheme's values have bfloat16's significand; their exponents are looked at when they are there."""
    return significand_of(scheme) <= SIGNIFICAND


def fits_factored(scheme: Any) -> bool:
    """Whether they have it without the scale that all of its scales have (NVFP4's)."""
    return fits(scheme) or significand_factored(scheme) <= SIGNIFICAND


@dataclass(frozen=True)
class Half:
    """An operand's values in bfloat16, rows [..., K], or [..., K + PARTS] where a bias goes with them."""

    rows: Tensor
    wider: bool = False
    factor: Tensor | None = None
    """What all of them are still to be multiplied by, a number."""
    exact: Callable[[], Tensor] | None = None
    """With a factor: their values, which are rounded more than once."""

    def values(self) -> Tensor:
        """The same in float32, without the bias."""
        if self.exact is not None:
            return self.exact()
        return (self.rows[..., :-PARTS] if self.wider else self.rows).float()


def half(quantizer: Any, rows: Tensor, beside: Tensor | None = None, memory: Memory | None = None) -> Half | None:
    """Rows [..., K] quantized, in bfloat16, and `beside` them columns [rows or 1, PARTS] for a bias.

    None where a product would meet a value that is flushed to zero.
    """
    rows = rows.detach()
    if not fits(scheme_of(quantizer)):
        values, factor = quantizing.factored(quantizer, rows)
        exact = functools.partial(quantizer.quantize, rows)
        return None if _flushed(quantizer, values) else Half(values, factor=factor, exact=exact)
    if beside is None:
        values = _rounded(quantizer, rows, None, memory)
        return None if _flushed(quantizer, values) else Half(values)
    length = rows.shape[-1]
    wide = empty(memory, rows.numel() // length, length + PARTS, dtype=torch.bfloat16, device=rows.device)
    _rounded(quantizer, rows, wide[:, :-PARTS])
    wide[:, -PARTS:] = beside
    return None if _flushed(quantizer, wide) else Half(wide.view(*rows.shape[:-1], -1), wider=True)


def _rounded(quantizer: Any, rows: Tensor, out: Tensor | None, memory: Memory | None = None) -> Tensor:
    """Rows [..., K] quantized in bfloat16, into `out` [rows, K] if there is one."""
    scheme, static = scheme_of(quantizer), quantizer.scales(rows) if isinstance(quantizer, StaticScheme) else None
    if isinstance(scheme, Scheme):
        matrix = rows if out is None else rows.reshape(out.shape)
        if (fast := quantizing.quantize(scheme, matrix, static, torch.bfloat16, out, memory=memory)) is not None:
            return fast
    values: Tensor = quantizer.quantize(rows)
    half = values.to(torch.bfloat16)
    half = torch.where((half == 0) & (values != 0), TINIEST, half)  # so that what was lost shows
    return half if out is None else out.copy_(half.reshape(out.shape))


def in_parts(bias: Tensor) -> Tensor | None:
    """A bias [N] as the sum of bfloat16 numbers [N, PARTS]; None where that is not exact."""
    parts, rest = [], bias.detach().float()
    for _ in range(PARTS):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return None if bool(rest.any()) else torch.stack(parts, -1)


def _flushed(quantizer: Any, values: Tensor) -> bool:
    """Whether a value other than zero is so small that a product with it may be flushed."""
    if smallest_of(scheme_of(quantizer)) >= SMALLEST:
        return False
    if (kernels := library(values.numel(), values.device)) is not None and _dense(values):
        return kernels.any_below(values, SMALLEST)
    return bool(((values != 0) & (values.abs() < SMALLEST)).any())


def _dense(x: Tensor) -> bool:
    """Whether memory holds the values of `x` one after another, in any order of the axes."""
    order = sorted(range(x.dim()), key=lambda axis: (x.stride(axis), x.shape[axis]), reverse=True)
    return x.permute(order).is_contiguous()


def linear(x: Half, weight: Half, bias: Tensor | None) -> Tensor | None:
    """Rows [..., K] times the rows of a weight [N, K], and a bias [N], rounded once, in float32; None: not exact."""
    if bias is not None:
        if (parts := in_parts(bias)) is None:
            return None
        rows = weight.rows
        if rows.is_inference() and not torch.is_inference_mode_enabled():
            rows = rows.clone()
        rows[:, -PARTS:] = parts
        return F.linear(x.rows, rows).float()
    return F.linear(x.rows, weight.rows).float()


def unrounded(call: Call, first: Half, second: Half) -> Tensor:
    """The product of two operands on a GPU, and a bias, in float32."""
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
    for factor in factors:  # one after the other: their product may be too small, or too large
        y = y.mul_(factor)
    return y.add_(call.bias) if linear and call.bias is not None else y


def matmul(layouts: Sequence[Layout], first: Half, second: Half) -> Tensor:
    """The product of two operands, rounded once, in float32."""
    left, right = (layout.back(operand.rows) for layout, operand in zip(layouts, (first, second), strict=True))
    return torch.matmul(left, right).float()


class BF16Product(Lowering):
    """Operands in bfloat16; `biased` ones have columns more, through which the bias comes in."""

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

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> Half | None:
        return half(self.quantizers[place], rows, ONES if self.biased else None, memory)

    def new(self, rows: Tensor) -> Half | None:
        made = half(self.quantizers[1], rows, ONES if self.biased else None)
        tiny = made is not None and made.factor is not None and float(made.factor) < SMALLEST
        return None if tiny else made  # what is subnormal could not be made again

    def again(self, rows: Tensor, kept: bool | Tensor) -> Half | None:
        """Values that were found exact when they were made."""
        if isinstance(kept, Tensor):
            return Half(quantizing.without_second(kept, rows), factor=kept)
        if not self.biased:
            return Half(rows.to(torch.bfloat16))
        wide = buffer(len(rows), rows.shape[1] + PARTS, dtype=torch.bfloat16)
        wide[:, :-PARTS].copy_(rows)
        return Half(wide, wider=True)

    in_parts = True

    def part(self, layouts: Sequence[Layout], first: Half, second: Half, memory: Memory) -> Tensor:
        """Multiply rows [heads, R, K] and [heads, N, K]: rounded to bfloat16, in float32."""
        left, right = first.rows, layouts[1].back(second.rows)
        shape = *left.shape[:-1], right.shape[-1]
        product = torch.bmm(left, right, out=memory.workspace.empty(memory.use, shape, left.dtype))
        return memory.workspace.empty(memory.use, shape).copy_(product)

    def pinned(self, rows: Tensor, scales: Any) -> Half | None:
        made = self.again(rows, True) if fits(scheme_of(self.quantizers[1])) else None
        return None if made is None or _flushed(self.quantizers[1], rows.to(torch.bfloat16)) else made

    def keep(self, made: Half) -> bool | Tensor:
        return True if made.factor is None else made.factor

    def product(self, call: Call, first: Half, second: Half) -> Tensor | None:
        bias = call.bias if call.function in LINEAR else None
        if not self.rounds:
            return unrounded(call, first, second)
        return linear(first, second, bias) if call.function in LINEAR else matmul(call.layouts, first, second)


class BF16Convolution(BF16Product):
    """The same of a convolution: its bias comes in as three more channels, at a tap that always meets the image."""

    def new(self, rows: Tensor) -> Half | None:
        return half(self.quantizers[1], rows)

    def again(self, rows: Tensor, kept: bool | Tensor) -> Half | None:
        return Half(rows.to(torch.bfloat16))

    def product(self, call: Call, first: Half, second: Half) -> Tensor | None:
        image, kernel = (layout.back(x.rows) for layout, x in zip(call.layouts, (first, second), strict=True))
        if call.bias is not None:
            tap, parts = Convolution.of(call).tap_inside, in_parts(call.bias)
            if tap is None or parts is None:
                return None
            kernel = F.pad(kernel, [0, 0] * len(tap) + [0, PARTS])
            place: Any = slice(None), slice(-PARTS, None), *tap
            kernel[place] = parts
        return ran(call, image, kernel).to(torch.float32, memory_format=torch.contiguous_format)
