"""Sums of whole numbers in an accumulator of N bits, which wraps, saturates or reports an overflow."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_accumulators.panels import LANES, padded_to, panels
from qsim_accumulators.whole_numbers import FLOAT32_WHOLE, bound_of, digits_of, exact_product
from qsim_core import Accumulator, QsimError, RecipeError
from qsim_core.formats.accelerator import compiled
from qsim_core.formats.format import table_of
from qsim_core.matmuls.partial_sums import PartialSums, Running, running, some_rows
from qsim_core.sites.arithmetic import NarrowSums, QuantizedRows

SOURCE = Path(__file__).parent / "saturating.cpp"
"""The same sums in C++, for a CPU."""
LONGEST_SUM = 2**31
"""Whole numbers below fit the integers of the native code, and float32 holds a result of 24 bits."""
NATIVE_TERMS = 16
"""The work of so many products is that of one quantized element, for the decision to compile."""


class IntegerAccumulator(Accumulator):
    """Adds up products of whole numbers, along the reduction axis in order, in an accumulator of `bits` bits.

    Operands are codes: integers as they are, other formats in units of the power of two in which their values are
    whole. e2m1 counts halves. Blocks that share scales are added up one by one, and their scaled sums in float32.

    A product may have a width of its own. Each sum of `chunk` products is exact. It is added to a running sum, which
    has `guard` more bits than the result. Two's complement numbers outside their range wrap around, saturate, or are an
    error. Wrapping is modular, so neither `chunk` nor `guard` matters then. A row with NaN gives NaN.

    Source: A2Q (arXiv 2308.13504), section 3: the range of N bits, and the sum of magnitudes that cannot leave it.
    """

    name = "integer"
    bits: int = Field(ge=8, le=32, description="bits of the sum, in two's complement")
    overflow: Literal["wrap", "saturate", "error"] = Field("wrap", description="what happens outside the range")
    guard: int = Field(0, ge=0, le=20, description="additional bits of the running sum")
    chunk: PositiveInt = Field(1, description="products that are added up exactly before the running sum")
    product: int | None = Field(None, ge=4, le=32, description="bits of one product; none: as many as it needs")

    @property
    def accumulator_bits(self) -> int:
        return self.bits + self.guard

    @property
    def narrow_sums(self) -> NarrowSums | None:
        return NarrowSums(self.bits, self.overflow == "wrap") if self.product is None else None

    def check(self, quantizers: Sequence[Any]) -> None:
        """Raise `RecipeError` unless both operands have formats whose values are whole numbers in some unit."""
        super().check(quantizers)
        for place, quantizer in zip(("first", "second"), quantizers, strict=True):
            try:
                digits_of(quantizer.rounds_to)
            except RecipeError as error:
                raise RecipeError(f"it adds up whole numbers, and in its {place} operand {error}") from None

    def multiply(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        """Multiply rows `[..., M, K]` and `[..., N, K]` to `[..., M, N]`, block by block of common scales."""
        first, second = (2.0 ** digits_of(rows.element) for rows in (left, right))
        single = first * second * _largest_unit(left) * _largest_unit(right)
        total: Tensor | None = None
        for x, w in left.blocks_with(right):
            sums = self._added_up(_times(x.units, first), _times(w.units, second), single)
            sums.mul_(w.scale.transpose(-1, -2) / second).mul_(x.scale / first)
            total = sums if total is None else total.add_(sums)
        assert total is not None
        return total.to(left.values.dtype)

    def add_up(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply and add up whole numbers `[..., M, n]` and `[..., N, n]` to `[..., M, N]`."""
        return self._added_up(left, right, _largest(left) * _largest(right))

    def _added_up(self, left: Tensor, right: Tensor, single: float) -> Tensor:
        """Add up products of which none can exceed `single`; the operands are measured where that is too much."""
        if self.product is not None and not self._fits(single, self.product):
            single = _largest(left) * _largest(right)
            if not self._fits(single, self.product):
                return self._in_order(left, right)
        bound = left.shape[-1] * single
        if not self._fits(bound, self.bits) and (self.overflow != "wrap" or bound >= FLOAT32_WHOLE):
            bound = min(bound, bound_of(left, right))
        exact = exact_product(left, right, bound)
        if self._fits(bound, self.bits):
            return exact.to(left.dtype)
        if self.overflow == "wrap":
            inside = self._fits(max(map(abs, torch.stack(exact.aminmax()).tolist())), self.bits)
            return (exact if inside else self._narrowed(exact, self.bits)).to(left.dtype)
        risky = exact_product(left.abs(), right.abs(), bound) > self._highest(self.bits)
        if right.dim() > 2:
            return self._in_order(left, right) if risky.any() else exact.to(left.dtype)
        rows, columns = (risky.flatten(0, -2).any(axis).nonzero().flatten() for axis in (1, 0))
        if len(rows):
            some = self._in_order(left.flatten(0, -2)[rows], right[columns])
            exact.flatten(0, -2)[rows.unsqueeze(-1), columns] = some.to(exact.dtype)
        return exact.to(left.dtype)

    def partial_sums(self, left: QuantizedRows, right: QuantizedRows, product: Tensor) -> PartialSums:
        """Tell an audit what the sums of codes did, block by block of common scales.

        A row w of the right operand is safe if ‖w‖₁ max|x| stays in the range of the result. x is the largest code
        of the left operand's format. Source: A2Q (arXiv 2308.13504), section 3.
        """
        first, second = (2.0 ** digits_of(rows.element) for rows in (left, right))
        chosen = some_rows(left.values, right.values)
        held, read = self._highest(self.bits + self.guard), self._highest(self.bits)
        single = self._highest(self.product) if self.product is not None else math.inf
        largest = first * float(table_of(left.element).finite.abs().max())
        found: PartialSums | None = None
        could, over, wrong, unsafe = (torch.zeros((), dtype=torch.bool) for _ in range(4))
        for x, w in left.blocks_with(right):
            codes = _times(x.units.index_select(-2, chosen), first), _times(w.units, second)
            sums = Running(*(t.nan_to_num(0.0) for t in running(*codes, min(self.chunk, x.units.shape[-1]))))
            narrow = sums.largest > single
            beyond = (sums.total > read) | (sums.total < -read - 1)
            left_range = (sums.high > held) | (sums.low < -held - 1) | beyond | narrow
            could = could | (sums.magnitude > read) | narrow
            over = over | left_range
            wrong = wrong | (beyond | narrow if self.overflow == "wrap" else left_range)
            magnitudes = codes[1].abs()
            unsafe = unsafe | (magnitudes.sum(-1) * largest > read) | (magnitudes.amax(-1) * largest > single)
            block = PartialSums(1, lowest=float(sums.low.min()), highest=float(sums.high.max()), whole=True)
            found = block if found is None else found + block
        assert found is not None
        return replace(
            found,
            outputs=over.numel(),
            could_overflow=int(could.sum()),
            overflowed=int(over.sum()),
            inexact=int(wrong.sum()),
            safe_rows=unsafe.numel() - int(unsafe.sum()),
            rows=unsafe.numel(),
        )

    def _in_order(self, left: Tensor, right: Tensor) -> Tensor:
        """Add up chunk after chunk, and keep each sum in range."""
        found = self._native(left, right)
        if found is not None:
            return found
        total = torch.zeros((), dtype=torch.float64, device=left.device)
        for x, w in zip(left.double().split(self.chunk, -1), right.double().split(self.chunk, -1), strict=True):
            total = self._narrowed(total + self._chunk(x, w), self.bits + self.guard)
        return self._narrowed(total, self.bits).to(left.dtype)

    def _native(self, left: Tensor, right: Tensor) -> Tensor | None:
        """Add up in C++; None: without a compiler, on another device, or for sums that do not fit 31 bits."""
        (*_, length), columns = left.shape, len(right)
        largest = _largest(left) * _largest(right) * min(self.chunk, length)
        short = self.bits <= 24 and self._highest(self.bits + self.guard) + largest < LONGEST_SUM
        if self.overflow != "saturate" or left.is_cuda or left.dim() > 2 or right.dim() > 2 or not short:
            return None
        library = compiled(SOURCE, left.numel() * columns // NATIVE_TERMS)
        if library is None or not left.isfinite().all() or not right.isfinite().all():
            return None
        own, others = padded_to(left.int(), length), panels(right.int(), length)
        product = torch.empty(len(left), len(others) * LANES)
        limits = (self._highest(self.bits + self.guard), self._highest(self.bits), self._highest(self.product or 32))
        library.functions.saturating_products(
            *(c_void_p(x.data_ptr()) for x in (own, others, product)),
            *map(c_int64, (*product.shape, length, self.chunk)),
            *(c_int32(int(limit)) for limit in limits),
            c_int32(torch.get_num_threads()),
        )
        return product[:, :columns].to(left.dtype)

    def _chunk(self, left: Tensor, right: Tensor) -> Tensor:
        if self.product is None:
            return left @ right.transpose(-1, -2)
        pairs = zip(left.unbind(-1), right.unbind(-1), strict=True)
        narrow = (self._narrowed(x.unsqueeze(-1) * w.unsqueeze(-2), self.product) for x, w in pairs)
        return functools.reduce(torch.add, narrow)

    def _narrowed(self, sums: Tensor, bits: int) -> Tensor:
        """Bring whole numbers to the range of so many bits."""
        highest = self._highest(bits)
        if self.overflow == "saturate":
            return sums.clamp(-highest - 1, highest)
        if self.overflow == "wrap":
            turns = sums.mul(2.0**-bits).add_(0.5).floor_()  # exact: sums have no more than 53 bits, or 24 in float32
            return sums - turns.mul_(2.0**bits)
        outside = (sums > highest) | (sums < -highest - 1)
        if outside.any():
            raise QsimError(f"{self}: a sum of {float(sums[outside][0]):.0f} does not fit {bits} bits")
        return sums

    def _fits(self, magnitude: float, bits: int) -> bool:
        return magnitude <= self._highest(bits)

    @staticmethod
    def _highest(bits: int) -> float:
        return 2.0 ** (bits - 1) - 1


def _times(units: Tensor, factor: float) -> Tensor:
    return units if factor == 1 else units * factor


def _largest_unit(rows: QuantizedRows) -> float:
    """A bound on the magnitude of an operand's units: that of the format, or their own where there are zero points."""
    if rows.scales is not None and rows.scales.zero is not None:
        return _largest(rows.units)
    return float(table_of(rows.element).finite.abs().max())


def _largest(rows: Tensor) -> float:
    return float(rows.abs().nan_to_num(0.0).max()) if rows.numel() else 0.0
