"""Sums in narrow floats in C++: the order of a sum, and the rounding of formats as native code has it."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qsim_accumulators.panels import LANES, padded_to, panels
from qsim_core import Format
from qsim_core.formats.accelerator import compiled
from qsim_core.formats.random_bits import drawn_at

SOURCE = Path(__file__).parent / "floats.cpp"
TERM_ELEMENTS = 14
"""The work of one term in Python is that of so many quantized elements, for the decision to compile."""
KINDS = {"even": 1, "zero": 2, "away": 3, "stochastic": 4}
"""The modes of rounding that the native code knows; 0 is float32."""
WORDS = 2**64 - 1


class Order(NamedTuple):
    """The order of a sum: in chunks, or in a tree."""

    format: Format
    """Rounds the sums of a chunk, or those of a tree."""
    chunk: int
    """The products of a chunk; 0: a tree."""
    outer: Format | None = None
    """Rounds the sums of chunks; None: float32."""
    alone: bool = False
    """True if all products are one chunk, whose sum is the result."""

    def roundings(self, length: int, products: bool) -> int:
        """Count the roundings of so many products; True: each product is rounded too."""
        sums = length - 1 if self.chunk == 0 else 0 if self.alone else -(-length // self.chunk)
        return length * (1 + products) + sums


class Rule(ctypes.Structure):
    """Rounding to a format, in the fields of `Rule` in floats.cpp."""

    _fields_ = [
        *((name, c_double) for name in ("low", "high", "bound", "below", "above", "smallest", "step", "zero")),
        ("kind", c_int32),
        ("seed", c_uint64),
    ]

    @classmethod
    def of(cls, number_format: Format | None) -> Rule | None:
        """The rule of a format, or of float32; None for a format that has no such rule."""
        if number_format is None:
            return cls(kind=0)
        steps, kind = number_format.steps, KINDS.get(number_format.rounding)
        if steps is None or steps.fixed or kind is None:
            return None
        below, above = steps.low, steps.high
        if steps.overflow is not None:
            below, above = -steps.overflow if below < 0 else below, steps.overflow
        return cls(
            steps.low,
            steps.high,
            2 * steps.high,
            below,
            above,
            2.0**steps.min_exponent,
            2.0**-steps.mantissa,
            -0.0 if steps.signed_zero else 0.0,
            kind,
            number_format.seed & WORDS,
        )


class Draws(ctypes.Structure):
    """The place of random numbers, in the fields of `Draws` in floats.cpp."""

    _fields_ = [("size", c_uint64), ("first", c_uint64), ("step", c_uint32), ("site", c_uint32)]


def native_sums(order: Order, product: Format | None, left: Tensor, right: Tensor, roundings: int = 0) -> Tensor | None:
    """Multiply and add up `[..., M, K]` and `[..., N, K]` in C++: float64 `[..., M, N]`.

    Stochastic rounding draws the reference's numbers, those after so many `roundings` at the same place. None: on
    another device, without a compiler, or for a format whose rounding only Python knows.
    """
    rules = Rule.of(product), Rule.of(order.format), Rule.of(order.outer)
    if left.is_cuda or None in rules or not left.numel() or not right.numel():
        return None
    library = compiled(SOURCE, TERM_ELEMENTS * left.numel() * right.shape[-2])
    if library is None:
        return None
    draws = any(rule is not None and rule.kind == KINDS["stochastic"] for rule in rules)
    place = drawn_at() if draws else (0, 0)
    single, inner, outer = (ctypes.byref(rule) for rule in rules if rule is not None)
    shape = torch.Size([*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-2]])

    def of_matrices(left: Tensor, right: Tensor, number: int = 0) -> Tensor:
        (rows, length), columns = left.shape, len(right)
        own, others = padded_to(left, length), panels(right, length)
        sums = own.new_empty(rows, len(others) * LANES)
        library.functions.float_sums(
            *(c_void_p(x.data_ptr()) for x in (own, others, sums)),
            *(single if product is not None else None, inner, None if order.alone else outer),
            ctypes.byref(Draws(shape.numel(), roundings * shape.numel() + number * rows * columns, *place)),
            *map(c_int64, (*sums.shape, columns, length, order.chunk)),
            c_int32(torch.get_num_threads()),
        )
        return sums[:, :columns]

    left, right = left.double(), right.double()
    if right.dim() == 2:
        return of_matrices(left.flatten(0, -2), right).view(shape)
    pairs = zip(*(x.expand(*shape[:-2], *x.shape[-2:]).flatten(0, -3) for x in (left, right)), strict=True)
    return torch.stack([of_matrices(x, w, number) for number, (x, w) in enumerate(pairs)]).view(shape)
