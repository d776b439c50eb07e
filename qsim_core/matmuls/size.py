"""The size of a matmul as a product of matrices: `[M, K]` times `[K, N]`, for each matrix of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qsim_core.matmuls.call import Call
from qsim_core.matmuls.convolution import TRANSPOSED_ARGUMENTS, Convolution


class Size(NamedTuple):
    """Products of one size."""

    batch: int
    """The matrices that have a right operand of their own, like the heads of attention or the groups of a kernel."""
    m: int
    n: int
    k: int
    """The length of the reduction axis."""

    @property
    def multiplications(self) -> int:
        """The multiplications of the product, each with an addition."""
        return self.batch * self.m * self.n * self.k


def size_of(call: Call) -> Size:
    """Give the size of a call with two operands.

    Of a convolution M counts positions, and K has the taps of the kernel. A transposed convolution multiplies the image
    by the kernel, whose taps are part of N, and adds up afterwards. Each row of a grouped product has one matrix.
    """
    left, right = call.operands
    if call.operation.startswith("conv"):
        return _convolution(call)
    if call.labels:
        return _labelled(call.labels, [left.shape, right.shape])
    rows, columns = (layout.rows(x).shape for layout, x in zip(call.layouts, call.operands, strict=True))
    *over, m, k = rows if len(rows) > 1 else (1, *rows)
    *batch, n, k = columns if len(columns) > 1 else (1, *columns)
    if call.operation.endswith("grouped_mm"):
        return Size(1, math.prod(over) * m, n, k)
    of_all = math.prod(torch.broadcast_shapes(tuple(over), tuple(batch)))
    matrices = math.prod(batch)
    return Size(matrices, of_all * m // max(matrices, 1), n, k)


def _convolution(call: Call) -> Size:
    image, kernel = call.operands
    images = image.shape[0] if image.dim() == kernel.dim() else 1
    taps = math.prod(kernel.shape[2:])
    if "transpose" in call.operation:
        groups = dict(zip(TRANSPOSED_ARGUMENTS, call.args, strict=False), **call.kwargs).get("groups", 1)
        positions = images * math.prod(image.shape[2 - kernel.dim() :])
        return Size(groups, positions, kernel.shape[1] * taps, kernel.shape[0] // groups)
    over = Convolution.of(call)
    outputs, inputs = kernel.shape[:2]
    return Size(over.groups, images * math.prod(over.shape), outputs // over.groups, inputs * taps)


def _labelled(labels: Sequence[str], shapes: Sequence[Sequence[int]]) -> Size:
    """Give the size of an einsum from the labels of its two operands and of its result."""
    left, right, kept = map(set, labels)
    sizes: dict[str, int] = {}
    for term, shape in zip(labels, shapes, strict=False):
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 0))

    def count(wanted: set[str]) -> int:
        return math.prod(sizes[label] for label in wanted)

    return Size(count(left & right & kept), count(left - right), count(right - left), count((left & right) - kept))
