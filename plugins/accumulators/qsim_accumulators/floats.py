"""Sums in a narrow number format: one product after the other, in chunks with a wider outer sum, or in a tree.

This is the reference. Where there is a compiler, a CPU computes the same bits in C++.
"""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_accumulators.float_kernels import Order, native_sums
from qsim_core import Accumulator, Format
from qsim_core.formats.random_bits import part
from qsim_core.sites.arithmetic import QuantizedRows


class Rounded:
    """Rounds float64 to a format, or to float32; stochastic rounding draws anew for each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, format: Format | None) -> Tensor:
        with part(self.calls):
            found: Any = x.float().double() if format is None else format.round(x)
        self.calls += 1
        return found  # type: ignore[no-any-return]


class FloatAccumulator(Accumulator):
    """Adds up products in number formats. Each sum is that of exact operands, rounded once.

    Operands are values of their formats in units of their scales. Blocks that share scales are added up one by one, and
    their scaled sums in float32. A product is exact, unless `product` names a format that rounds it. Formats round,
    saturate and overflow as they do elsewhere. An author writes `sums`.
    """

    product: Format | None = Field(None, description="the format that rounds each product; none: exact products")

    def multiply(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        """Multiply rows `[..., M, K]` and `[..., N, K]` to `[..., M, N]`, block by block of common scales."""
        rounded = Rounded()
        parts = (
            self._added_up(x.units, w.units, rounded) * x.scale * w.scale.transpose(-1, -2)
            for x, w in left.blocks_with(right)
        )
        return functools.reduce(torch.add, parts).to(left.values.dtype)

    def add_up(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply and add up `[..., M, n]` and `[..., N, n]` to `[..., M, N]`, in the dtype of `left`."""
        return self._added_up(left, right, Rounded())

    @abstractmethod
    def sums(self, products: Iterator[Tensor], rounded: Rounded) -> Tensor:
        """Add up products, which are given column by column in float64, with each sum rounded."""

    def order(self, length: int) -> Order | None:
        """The order in which native code adds up so many products, in place of `sums`; None: it cannot."""
        return None

    def _added_up(self, left: Tensor, right: Tensor, rounded: Rounded) -> Tensor:
        order = self.order(left.shape[-1])
        found = order and native_sums(order, self.product, left, right, rounded.calls)
        if order and found is not None:
            rounded.calls += order.roundings(left.shape[-1], self.product is not None)
            return found.to(left.dtype)
        columns = zip(left.double().unbind(-1), right.double().unbind(-1), strict=True)
        exact = (x.unsqueeze(-1) * w.unsqueeze(-2) for x, w in columns)
        products = exact if self.product is None else (rounded(product, self.product) for product in exact)
        return self.sums(products, rounded).to(left.dtype)


class Sequential(FloatAccumulator):
    """Adds up one product after the other in a number format: `sequential(fp16)`. The first sum is one product."""

    name = "sequential"
    format: Format = Field(description="the number format of the running sum")

    @property
    def accumulator_bits(self) -> int:
        return self.format.width

    def sums(self, products: Iterator[Tensor], rounded: Rounded) -> Tensor:
        return in_order(products, self.format, rounded)

    def order(self, length: int) -> Order:
        return Order(self.format, length, alone=True)


class Chunked(FloatAccumulator):
    """Adds up `n` products one by one in `format`, and the sums of such chunks one by one in `outer`.

    Source: Wang et al., "Training deep neural networks with 8-bit floating point numbers" (arXiv 1812.08011), section
    2.3, chunk-based accumulation.
    """

    name = "chunked"
    format: Format = Field(description="the number format of the sum in a chunk")
    n: PositiveInt = Field(description="products in a chunk; the last chunk may be short")
    outer: Format | None = Field(None, description="the number format of the sum of chunks; none: float32")

    @property
    def accumulator_bits(self) -> int:
        return self.format.width

    def sums(self, products: Iterator[Tensor], rounded: Rounded) -> Tensor:
        def chunks() -> Iterator[Tensor]:
            while chunk := list(itertools.islice(products, self.n)):
                yield in_order(iter(chunk), self.format, rounded)

        return in_order(chunks(), self.outer, rounded)

    def order(self, length: int) -> Order:
        return Order(self.format, self.n, self.outer)


class Tree(FloatAccumulator):
    """Adds up neighbouring products in pairs, then neighbouring sums in pairs, until one is left: `tree(bf16)`.

    Each product and each sum is rounded to `format`. The last of an odd number goes to the next level as it is.
    """

    name = "tree"
    format: Format = Field(description="the number format of all sums")

    @property
    def accumulator_bits(self) -> int:
        return self.format.width

    def sums(self, products: Iterator[Tensor], rounded: Rounded) -> Tensor:
        level = [rounded(product, self.format) for product in products]
        while len(level) > 1:
            pairs = [rounded(odd_sum(*pair), self.format) for pair in zip(level[::2], level[1::2], strict=False)]
            level = pairs + level[2 * len(pairs) :]
        return level[0]

    def order(self, length: int) -> Order:
        return Order(self.format, 0)


def in_order(terms: Iterator[Tensor], format: Format | None, rounded: Rounded) -> Tensor:
    """Add up terms one by one, with each sum rounded."""
    total = rounded(next(terms), format)
    for term in terms:
        total = rounded(odd_sum(total, term), format)
    return total


def odd_sum(a: Tensor, b: Tensor) -> Tensor:
    """Add float64 tensors, rounded to odd: a later rounding to 51 bits or fewer gives that of the exact sum.

    Source: Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
    odd" (IEEE Transactions on Computers 57, 2008), theorem 1. The error of the sum is that of Knuth's TwoSum.
    """
    total = a + b
    other = total - a
    error = (a - (total - other)) + (b - other)
    inexact = (error != 0) & (total.view(torch.int64) % 2 == 0) & total.isfinite()
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype)
    return torch.where(inexact, torch.nextafter(total, toward), total)
