"""The int8_blocks arithmetic, on CPUs: codes of at most 8 bits under the scales of their blocks.

Formats of 4 bits are integers too: twice an e2m1 value is one of 0, 1, 2, 3, 4, 6, 8, 12. The products of codes
that share a scale on either side are added up in int32, exactly. Each such sum is converted to float32, multiplied by
both scales, and added to the others in float32, in the order of the blocks:

    y  =  sum over blocks of  (t sum over k of q r) s

where s is the scale of the left operand and t that of the right one. The float32 reference multiplies and rounds each
s q t r.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qsim_core.formats.format import Format
from qsim_core.matmuls.call import LINEAR, Call
from qsim_core.matmuls.layout import SECOND_LAST, Layout
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.sites.arithmetic import NarrowSums
from qsim_core.sites.workspace import Memory, empty
from qsim_fast import quantizing
from qsim_fast.blockwise import ROW, block_of, step_of
from qsim_fast.identity_cache import cached_by_identity
from qsim_fast.int8 import encode_into, to_nearest
from qsim_fast.kernels import block_products
from qsim_fast.kernels.arguments import buffer
from qsim_fast.kernels.block_products import GROUP, PIECE, BlockKernels, Packed, Range, Rows, Terms
from qsim_fast.known_maximum import KnownMaximum
from qsim_fast.partial_execution import PartialLowering
from qsim_fast.quantizing import scheme_of

SMALLEST_PRODUCT = 2**19
"""The multiplications of a product for which codes are worth packing."""
MARGIN = 1.001
"""Covers the rounding of norms."""
LARGEST_SCALE = 2.0**64
"""A sum times a larger scale may overflow, where the reference's products do not."""


@cached_by_identity
def unit_of(element: Format) -> float | None:
    """Give the power of two that turns all values of a format into whole numbers of 8 bits; None: there is none."""
    if element.draws or element.width > 8:
        return None
    values = element.table()
    values = values[~values.isnan()]
    positive = values[values > 0]
    if not len(positive) or not bool(values.isfinite().all()):
        return None
    unit = 1 / float(positive.min())
    codes = values * unit
    whole = math.frexp(unit)[0] == 0.5 and bool((codes == codes.round()).all())
    return unit if whole and float(codes.min()) >= -128 and float(codes.max()) <= 127 else None


@cached_by_identity
def fits(scheme: Any) -> bool:
    """Tell if a scheme makes whole numbers under scales of rows, or of blocks of a multiple of four columns."""
    scheme = _bare(scheme)
    if not isinstance(scheme, Scheme) or not scheme.symmetric or isinstance(scheme.granularity, tuple):
        return False
    if not quantizing.uses_base_methods(type(scheme)) or unit_of(scheme.coded) is None:
        return False
    return not isinstance(scheme.granularity, int) or scheme.granularity % GROUP == 0


def _bare(quantizer: Any) -> Any:
    """The scheme of a quantizer, without what is known of its scales."""
    return quantizer.scheme if isinstance(quantizer, KnownMaximum) else scheme_of(quantizer)


def possible(call: Call) -> bool:
    """Tell if the kernels can multiply these operands: both are summed along rows, of as many matrices."""
    first, second = (layout.rows(operand) for layout, operand in zip(call.layouts, call.operands, strict=True))
    alike = second.dim() == 2 or first.shape[:-2] == second.shape[:-2]
    return alike and (call.function in LINEAR or call.layouts[1] is SECOND_LAST)


@cached_by_identity
def range_of(scheme: Scheme) -> Range:
    """Give the lowest and the highest code of a scheme."""
    unit = unit_of(scheme.coded)
    assert unit is not None
    return Range(round(scheme.coded.min * unit), round(scheme.coded.max * unit))


@dataclass(frozen=True)
class LeftRows:
    """The left operand of a product."""

    rows: Rows
    low: int
    """The lowest code."""
    inner: int
    """The length of a row."""

    @functools.cached_property
    def norm(self) -> float:
        """The largest norm of a row of codes. With that of the other operand it bounds the sums, partial ones too."""
        return float(self._units().square_().sum(-1).max().sqrt())

    def by_heads(self, repeats: int) -> LeftRows:
        """Give each head of queries its matrix, which it has."""
        assert repeats == 1
        return self

    def part(self, some: slice, here: slice) -> LeftRows:
        """Take some of the matrices, and some rows of each."""
        codes, scale = self.rows.codes, self.rows.scale
        scale = scale if len(scale) == 1 else scale[some]
        scale = scale if scale.shape[1] == 1 else scale[:, here]
        return replace(self, rows=Rows(codes[some, here], scale, self.rows.every))

    def values(self) -> Tensor:
        """Compute the values, float32 [S, M, K]."""
        return _scaled(self._units(), self.rows)

    def _units(self) -> Tensor:
        return self.rows.codes.view(torch.uint8)[..., : self.inner].float().add_(self.low)


class RightRows:
    """The right operand of a product. The kernels pack it when they first multiply it."""

    def __init__(self, packed: Packed, terms: Terms, shape: torch.Size, scales: Scales) -> None:
        self.packed = packed
        self.terms = terms
        self.shape = shape
        """[..., N, K]"""
        self.scales = scales
        """The scales as the scheme gives them."""

    @functools.cached_property
    def norm(self) -> float:
        """The largest norm of a row of codes."""
        return float(self.packed.unpacked().codes.float().square_().sum(-1).max().sqrt())

    def times(self, left: LeftRows, bias: Tensor | None, y: Tensor) -> Tensor:
        """Multiply rows by these into y [S, M, N]."""
        kernels = self._ready(y.numel() * -(-self.packed.inner // min(self.terms.block, PIECE)))
        if kernels is None:
            return block_products.multiply(left.rows, self.packed.unpacked(), self.terms, bias, y)
        return kernels.multiply(left.rows, self.packed, self.terms, bias, y)

    def _ready(self, work: int) -> BlockKernels | None:
        """Pack the codes if there are kernels, and give these. `work` counts what Python would compute."""
        kernels = block_products.kernels_for(work)
        if kernels is not None and self.packed.sums is None:
            self.packed = kernels.pack(self.packed, self.terms)
        return kernels

    def by_heads(self, repeats: int) -> RightRows:
        """Repeat each matrix, for the heads of queries that share it."""
        self._ready(self.packed.codes.numel())
        return self if repeats == 1 else self._with(self.packed.repeated(repeats))

    def part(self, some: slice, here: slice, columns: slice | None = None) -> RightRows:
        """Take some of the matrices, and of each the first rows, or the first columns."""
        stop = self.packed.inner if columns is None else columns.stop
        return self._with(self.packed.part(some, self.packed.rows if here.stop is None else here.stop, stop))

    def _with(self, packed: Packed) -> RightRows:
        return RightRows(packed, self.terms, torch.Size((len(packed.codes), packed.rows, packed.inner)), self.scales)

    def values(self) -> Tensor:
        """Compute the values, float32 [..., N, K]."""
        return self.values_into(torch.empty(self.shape, device=self.packed.codes.device))

    def values_into(self, out: Tensor) -> Tensor:
        """Compute the values in the memory of a tensor [..., N, K]."""
        if out.dtype != torch.float32 or not out.is_contiguous():
            return out.copy_(self.values())
        form = self.packed.unpacked()
        _scaled(out.view(form.codes.shape).copy_(form.codes), form)
        return out


def _scaled(units: Tensor, operand: Rows | Packed) -> Tensor:
    """Multiply units [S, M, K], in their memory, by the scale of each column."""
    scale, inner = operand.scale, units.shape[-1]
    if scale.shape[-1] == 1:
        return units.mul_(scale)
    if inner % operand.every or not units.is_contiguous():
        return units.mul_(scale.repeat_interleave(operand.every, -1)[..., :inner])
    units.view(*units.shape[:-1], -1, operand.every).mul_(scale.unsqueeze(-1))
    return units


class IntegerBlocksProduct(PartialLowering):
    """A product of codes under the scales of their blocks. The codes take the place of a large overwritten weight."""

    arithmetic = "int8_blocks"

    def __init__(self, quantizers: Sequence[Any], batched: bool) -> None:
        super().__init__(quantizers)
        schemes = [_bare(quantizer) for quantizer in quantizers[:2]]
        left, right = map(range_of, schemes)
        self.terms = Terms(step_of(schemes, ROW), left, right)
        self.batched = batched
        """True if the right operand has a matrix for each matrix of the left one."""
        self.highest = math.inf
        """The product is declined if a sum of codes may exceed it."""

    @property
    def key(self) -> tuple[Any, ...]:
        return *super().key, self.batched, self.terms.bits

    def of(self, place: int) -> tuple[Any, ...]:
        return *super().of(place), place

    def narrowed(self, sums: NarrowSums) -> IntegerBlocksProduct | None:
        """Let sums have fewer bits; None if they are not those of whole blocks, or not of the formats' own codes."""
        schemes = [_bare(quantizer) for quantizer in self.quantizers]
        nested = self.terms.block in (block_of(scheme, ROW) for scheme in schemes)
        if not nested or any((unit_of(scheme.coded) or 0) < 1 for scheme in schemes):
            return None
        if sums.wraps:
            self.terms = replace(self.terms, bits=sums.bits)
        else:
            self.highest = 2.0 ** (sums.bits - 1) - 1
        return self

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> Any:
        return self._taken(place, self.quantizers[place], rows, None, memory)

    def again(self, rows: Tensor, kept: Scales) -> RightRows | None:
        return self._taken(1, to_nearest(scheme_of(self.quantizers[1])), rows, kept, None)  # type: ignore[no-any-return]

    def _taken(self, place: int, quantizer: Any, rows: Tensor, known: Scales | None, memory: Memory | None) -> Any:
        """Quantize rows [..., R, K]; None where a static scale would hide a NaN, or a scale is too large."""
        scheme, static, tensor_scale = _bare(quantizer), known, None
        matrix = rows.detach().reshape(-1, rows.shape[-1])
        if isinstance(quantizer, StaticScheme):
            static = quantizer.scales(rows)
        elif isinstance(quantizer, KnownMaximum):
            static, tensor_scale = quantizer.known(matrix)
        if static is not known and bool(matrix.isnan().any()):
            return None
        unit, every = unit_of(scheme.coded), block_of(scheme, rows.shape[-1])
        assert unit is not None
        lowest = self.terms.left.low if place == 0 else 0
        length = -(-rows.shape[-1] // GROUP) * GROUP
        codes = empty(memory if place == 0 else None, len(matrix), length, dtype=torch.int8, device=rows.device)
        scales = encode_into(codes[:, : rows.shape[-1]], scheme, matrix, static, lowest, unit, tensor_scale)
        if place == 1 and bool((scales.scale > LARGEST_SCALE).any()):
            return None
        heads = (math.prod(rows.shape[:-2]), rows.shape[-2]) if self.batched else (1, len(matrix))
        scale = scales.scale.float().mul(1 / unit)
        scale = scale.view(*heads, -1) if len(scale) > 1 else scale.unsqueeze(0)
        if place == 0:
            return LeftRows(Rows(codes.view(*heads, -1), scale, every), lowest, rows.shape[-1])
        packed = Packed(codes.view(*heads, -1)[..., : rows.shape[-1]], scale, None, every, heads[1], rows.shape[-1])
        return RightRows(packed, self.terms, rows.shape, scales)

    def compact(self, made: RightRows) -> bool:
        return made.shape.numel() >= SMALLEST_PRODUCT

    def product(self, call: Call, first: LeftRows, second: RightRows) -> Tensor | None:
        if self.highest < math.inf and MARGIN * first.norm * second.norm > self.highest:
            return None
        bias = call.bias if call.function in LINEAR else None
        bias = None if bias is None else bias.detach().float().contiguous()
        shape = call.layouts[0].rows(call.operands[0]).shape[:-1]
        y = buffer(*first.rows.codes.shape[:2], second.packed.rows)
        return second.times(first, bias, y).view(*shape, second.packed.rows)

    def part(self, layouts: Sequence[Layout], first: LeftRows, second: RightRows, memory: Memory) -> Tensor:
        shape = *first.rows.codes.shape[:2], second.packed.rows
        return second.times(first, None, memory.workspace.empty(memory.use, shape))
