"""The kernels of `blocks.cpp`: codes are packed, and multiplied under the scales of their blocks.

`multiply` is the reference in Python, of the same bits. It multiplies while the kernels are not compiled.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_int32
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qsim_fast.kernels import native
from qsim_fast.kernels.arguments import BlockProduct, Columns, buffer

SOURCE = Path(__file__).parent / "blocks.cpp"
PIECE = 128
"""The number of columns of a sum of codes, at most. A part of a packed operand ends at a multiple of it."""
GROUP = 4
"""Blocks of codes, and packed rows, are as long as a multiple of this."""
EXACT_IN_FLOAT32 = 2**24
SHORTEST_PIECE = 16
"""The columns that have to fit into a sum of 16 bits for it to pay."""
SMALL, WIDE, PORTABLE = range(3)
"""The kinds of kernels: for small codes, for any codes of 8 bits, and in plain C++."""


class Range(NamedTuple):
    """The lowest and the highest code of an operand."""

    low: int
    high: int


@dataclass(frozen=True)
class Terms:
    """The numbers that a product adds up."""

    block: int
    """The number of columns that have one scale on either side; a multiple of `GROUP`, or a whole row."""
    left: Range
    right: Range
    bits: int = 32
    """The bits of a block's sum of codes, in two's complement; it wraps around."""

    @property
    def largest(self) -> int:
        """The largest product of two codes."""
        return _magnitude(self.left) * _magnitude(self.right)

    @property
    def largest_counted(self) -> int:
        """The largest product of two codes, where the left ones are counted from the lowest."""
        return (self.left.high - self.left.low) * _magnitude(self.right)

    def piece(self, most: int = PIECE) -> int:
        """The number of columns of a sum of codes: it divides the block, and is at most so many, or `GROUP`."""
        return next(
            size for size in (128, 64, 32, 16, 8, GROUP) if (size <= most and self.block % size == 0) or size == GROUP
        )


def _magnitude(codes: Range) -> int:
    return max(-codes.low, codes.high)


@dataclass(frozen=True)
class Rows:
    """The left operand: the codes of rows [S, M, K], as bytes of code - lowest code, and their scales."""

    codes: Tensor
    """[S, M, K or more], in int8; codes past the length of the right operand count for nothing."""
    scale: Tensor
    """[S or 1, M or 1, blocks or 1]"""
    every: int
    """The number of columns that share a scale."""


@dataclass(frozen=True)
class Packed:
    """The right operand: rows [S, N, K] of signed codes, in the order in which a kernel reads them."""

    codes: Tensor
    """[S, panels, K / group, panel, group]; the reference has [S, N, K]."""
    scale: Tensor
    """[S, panels, blocks or 1, panel]; the reference has [S or 1, N or 1, blocks or 1]."""
    sums: Tensor | None
    """The sums of pieces, [S, panels, pieces, panel]; the reference has none."""
    every: int
    """The number of columns that share a scale."""
    rows: int
    """N."""
    inner: int
    """K."""
    kind: int = PORTABLE

    def part(self, some: slice, rows: int, inner: int) -> Packed:
        """Take some of the matrices, and the first rows and columns; columns to a multiple of `PIECE`, or all."""
        scale = self.scale if len(self.scale) == 1 else self.scale[some]
        if self.sums is None:
            scale = scale if scale.shape[1] == 1 else scale[:, :rows]
            return replace(self, codes=self.codes[some, :rows, :inner], scale=scale, rows=rows, inner=inner)
        return replace(self, codes=self.codes[some], scale=scale, sums=self.sums[some], rows=rows, inner=inner)

    def repeated(self, times: int) -> Packed:
        """Repeat each matrix, for heads of queries that share one."""
        scale = self.scale if len(self.scale) == 1 else self.scale.repeat_interleave(times, 0)
        sums = None if self.sums is None else self.sums.repeat_interleave(times, 0)
        return replace(self, codes=self.codes.repeat_interleave(times, 0), scale=scale, sums=sums)

    def unpacked(self) -> Packed:
        """Give the form for the reference."""
        if self.sums is None:
            return self
        codes = self.codes.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)[:, : self.rows, : self.inner]
        scale = self.scale.transpose(-1, -2).flatten(1, 2)[:, : self.rows]
        return Packed(codes, scale, None, self.every, self.rows, self.inner)


class Layout(NamedTuple):
    """The order in which a kernel reads codes."""

    panel: int
    """The number of columns that it multiplies at a time."""
    group: int
    """The number of successive codes of a column."""
    pairs: bool
    """True if it adds up a piece in 16 bits, half of each group in either sum."""

    def piece(self, terms: Terms) -> int:
        """The number of columns that it adds up at a time."""
        return terms.piece((2**15 - 1) // max(1, terms.largest) // 2 * GROUP if self.pairs else PIECE)


class BlockKernels:
    """The compiled kernels."""

    def __init__(self, raw: ctypes.CDLL) -> None:
        self.raw = raw
        self.raw.dot_layout.argtypes = [c_int32, *[POINTER(c_int32)] * 3]
        self.raw.pack_columns.argtypes = [POINTER(Columns)]
        self.raw.multiply_blocks.argtypes = [POINTER(BlockProduct)]
        self.layouts = [self._layout(kind) for kind in (SMALL, WIDE, PORTABLE)]

    def _layout(self, kind: int) -> Layout:
        panel, group, pairs = c_int32(), c_int32(), c_int32()
        self.raw.dot_layout(kind, panel, group, pairs)
        return Layout(panel.value, group.value, bool(pairs.value))

    def kind_for(self, terms: Terms) -> int:
        """Choose the fastest kernel that is exact."""
        small = self.layouts[SMALL]
        if not small.pairs:
            return SMALL
        exact = 2 * terms.largest_counted < 2**15 and small.piece(terms) * terms.largest // 2 < 2**15
        return SMALL if exact and small.piece(terms) >= min(terms.block, SHORTEST_PIECE) else WIDE

    def pack(self, given: Packed, terms: Terms, kind: int | None = None) -> Packed:
        """Pack rows for a kernel."""
        kind = self.kind_for(terms) if kind is None else kind
        samples, rows, length = given.codes.shape
        panel, group, _ = self.layouts[kind]
        piece = self.layouts[kind].piece(terms)
        panels, inner, scales = -(-rows // panel), _rounded_up(length), given.scale.shape[-1]
        codes = buffer(samples, panels, inner // group, panel, group, dtype=torch.int8)
        scale = buffer(samples, panels, scales, panel)
        sums = buffer(samples, panels, -(-inner // piece), panel, dtype=torch.int32)
        self.raw.pack_columns(
            Columns(
                given.codes.data_ptr(),
                *given.codes.stride()[:2],
                given.scale.data_ptr(),
                *_steps(given.scale),
                scales,
                codes.data_ptr(),
                scale.data_ptr(),
                sums.data_ptr(),
                samples,
                rows,
                length,
                inner,
                piece,
                kind,
                torch.get_num_threads(),
            )
        )
        return Packed(codes, scale, sums, given.every, rows, given.inner, kind)

    def multiply(self, left: Rows, right: Packed, terms: Terms, bias: Tensor | None, y: Tensor) -> Tensor:
        """Multiply rows [S, M, K] by packed rows [S, N, K] into y [S, M, N]; `bias` is [N]."""
        assert right.sums is not None
        inner = _rounded_up(right.inner)
        block = min(terms.block, inner)
        samples, rows, columns = y.shape
        self.raw.multiply_blocks(
            BlockProduct(
                left.codes.data_ptr(),
                *left.codes.stride()[:2],
                left.scale.data_ptr(),
                *_steps(left.scale),
                _blocks_of_scale(left.every, left.scale.shape[-1], block),
                right.codes.data_ptr(),
                *right.codes.stride()[:2],
                right.scale.data_ptr(),
                *right.scale.stride()[:2],
                _blocks_of_scale(right.every, right.scale.shape[2], block),
                right.sums.data_ptr(),
                *right.sums.stride()[:2],
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                *y.stride()[:2],
                samples,
                rows,
                columns,
                inner,
                block,
                self.layouts[right.kind].piece(terms),
                -terms.left.low,
                32 - terms.bits,
                right.kind,
                torch.get_num_threads(),
            )
        )
        return y


def _rounded_up(length: int) -> int:
    return -(-length // GROUP) * GROUP


def _steps(scale: Tensor) -> tuple[int, int]:
    """The steps from one matrix to the next and from one row to the next; 0 along an axis of size 1."""
    return scale.stride(0) if scale.shape[0] > 1 else 0, scale.stride(1) if scale.shape[1] > 1 else 0


def _blocks_of_scale(every: int, scales: int, block: int) -> int:
    """The number of blocks that share a scale; more than there are, where all do."""
    return 2**62 if scales == 1 else every // block


def kernels_for(work: int) -> BlockKernels | None:
    """Give the kernels; None while they are not worth compiling, or without a compiler. `work` is that of this call."""
    raw = native.compiled(SOURCE, work)
    return None if raw is None else _bound(raw)


@functools.cache
def _bound(raw: ctypes.CDLL) -> BlockKernels:
    return BlockKernels(raw)


def multiply(left: Rows, right: Packed, terms: Terms, bias: Tensor | None, y: Tensor) -> Tensor:
    """Multiply rows [S, M, K] by rows [S, N, K] into y [S, M, N], block by block, with the bits of the kernels.

    The sums of a block are exact in float32, or in float64.
    """
    block = min(terms.block, right.inner)
    dtype = torch.float32 if block * terms.largest < EXACT_IN_FLOAT32 else torch.float64
    y.zero_()
    for first in range(0, right.inner, block):
        columns = slice(first, min(first + block, right.inner))
        units = left.codes[..., columns].view(torch.uint8).to(dtype) + terms.left.low
        sums = torch.matmul(units, right.codes[..., columns].to(dtype).transpose(-1, -2))
        if terms.bits < 32:
            shift = 32 - terms.bits
            sums = sums.int().bitwise_left_shift_(shift).bitwise_right_shift_(shift)
        sums = sums.float()
        sums *= _scale_at(first, right).transpose(-1, -2)
        sums *= _scale_at(first, left)
        y += sums
    return y if bias is None else y.add_(bias)


def _scale_at(column: int, operand: Rows | Packed) -> Tensor:
    """The scales of the block that begins at this column, [S or 1, rows or 1, 1]."""
    at = 0 if operand.scale.shape[-1] == 1 else column // operand.every
    return operand.scale[..., at : at + 1]
