"""The work of a forward at each site: its products by size, and the bits of their operands; and hardware that does it.

Hardware is a component that says what work costs. It knows the work alone, and no model.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

from qsim_core.components.component import Component
from qsim_core.formats.format import Format
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.low_rank import LowRank
from qsim_core.matmuls.size import Size, size_of
from qsim_core.sites.operand import roles_of
from qsim_core.sites.site import Site

SUM_BITS = 32
"""The width of the sums of factors beside a weight."""


class Product(BaseModel):
    """Products of one size: `[M, K]` times `[K, N]`, for each matrix of a batch."""

    model_config = ConfigDict(frozen=True)

    batch: int = Field(description="matrices that have a right operand of their own, like the heads of attention")
    m: int = Field(description="rows of the left operand; positions in a convolution")
    n: int = Field(description="columns of the right operand")
    k: int = Field(description="length of the reduction axis")
    calls: int = Field(description="how often a product of this size was computed")

    @property
    def multiplications(self) -> int:
        """The multiplications of all calls, each with an addition."""
        return self.calls * Size(self.batch, self.m, self.n, self.k).multiplications


@dataclass(frozen=True)
class TensorWork:
    """An operand or the result of a product, as a memory holds it."""

    role: str
    """Its name in a recipe: weight, input, output; at attention queries, keys, probabilities, values."""
    elements: int
    bits: float
    """Bits of one element, with its share of the scales."""
    dtype: torch.dtype
    """The dtype of the model, in which an element is held that is not quantized."""
    format: Format | None
    """The number format of the elements; None: they are not quantized, or their quantizer has no format."""

    @property
    def bytes(self) -> float:
        """The bytes of all elements."""
        return self.elements * self.bits / 8

    @property
    def width(self) -> int:
        """The bits of one element without scales."""
        return self.dtype.itemsize * 8 if self.format is None else self.format.width


@dataclass(frozen=True)
class SiteWork:
    """The products of one size that a site computes in a forward."""

    site: str
    product: Product
    operands: tuple[TensorWork, TensorWork]
    result: TensorWork
    accumulator_bits: int
    """The width of the sum, as the site's arithmetic tells it."""
    weight: str | None
    """The full name of the parameter that is multiplied."""

    @property
    def bytes(self) -> float:
        """The bytes that are read and written: a weight once, and other tensors in each call."""
        tensors = (*self.operands, self.result)
        return sum(one.bytes * (1 if one.role == "weight" else self.product.calls) for one in tensors)


class Cost(BaseModel):
    """The cost of the work of one forward. `seconds` and `joules` are added up where forwards follow each other."""

    model_config = ConfigDict(frozen=True)

    totals: dict[str, float] = Field(
        min_length=1, description="by quantity, like seconds; parts of the first follow it"
    )
    sites: dict[str, dict[str, float | str]] = Field({}, description="the same site by site, and words about it")
    assumptions: list[str] = Field(description="the conditions under which these numbers hold")


class Hardware(Component):
    """Hardware that computes products. An author writes one method: `cost`. Options that are Inf or NaN are refused."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: ClassVar[str] = "hardware"
    hook: ClassVar[str] = "qsim_hardware"

    @abstractmethod
    def cost(self, work: Sequence[SiteWork]) -> Cost:
        """Compute the cost of the products of one forward."""

    def price(self, simulation: Any, example: Any) -> Cost:
        """Compute the cost of a forward of a `Simulation`. Hardware that prices more than products overrides this."""
        return self.cost(simulation.work(example))

    def products_only(self) -> Self:
        """Give hardware that prices products alone: itself, unless it overrides this too."""
        return self


class _Met(NamedTuple):
    """A call at a site: its size, and the role, the elements and the shape as rows of each operand."""

    size: Size
    operands: tuple[tuple[str, int, torch.Size], ...]


class WorkCounter:
    """Counts the products that the sites compute. Products of more than two operands are left out."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[_Met]] = defaultdict(Counter)

    def __call__(self, site: Site, call: Call) -> None:
        """Count one call."""
        if len(call.operands) == 2:
            roles = roles_of([place if place == call.weight else None for place in range(2)])
            rows = (layout.rows(x).shape for layout, x in zip(call.layouts, call.operands, strict=True))
            elements = _elements(call, size := size_of(call))
            self._counts[site.name][_Met(size, tuple(zip(roles, elements, rows, strict=True)))] += 1

    def products(self, name: str) -> list[Product]:
        """Give the products of the site of this name, in the order in which their sizes were first met."""
        sizes: Counter[Size] = Counter()
        for met, calls in self._counts[name].items():
            sizes[met.size] += calls
        return [Product(**size._asdict(), calls=calls) for size, calls in sizes.items()]

    def work(self, sites: Iterable[Site], dtype: torch.dtype) -> Iterator[SiteWork]:
        """Give the work of these sites, under the quantizers that they have; others are in the model's dtype."""
        for site in sites:
            for met, calls in self._counts[site.name].items():
                batch, m, n, k = met.size
                left, right = (_tensor(site, *operand, dtype) for operand in met.operands)
                result = _tensor(site, "output", batch * m * n, torch.Size([batch, m, n]), dtype)
                product = Product(batch=batch, m=m, n=n, k=k + site.appended, calls=calls)
                sum_bits = site.plan.arithmetic.accumulator_bits
                done = SiteWork(site.name, product, (left, right), result, sum_bits, site.weight)
                yield done
                yield from () if site.beside is None else work_beside(site.beside, done)


def _elements(call: Call, size: Size) -> list[int]:
    """Count the elements of each operand that are read: of a stack of experts one for each row, at most all."""
    left, right = call.operands
    if call.operation.endswith("grouped_mm") and right.dim() == 3:
        return [left.numel(), right[: size.m].numel()]
    return [left.numel(), right.numel()]


def work_beside(factors: LowRank, work: SiteWork) -> Iterator[SiteWork]:
    """Give the work of two factors beside a weight. The sums of the second one go on in those of the site's product."""
    rows = work.product.batch * work.product.m
    for factor, results in zip(factors.factors, (rows, 0), strict=True):
        (n, k), dtype = factor.shape, factor.dtype
        tensors = [
            TensorWork(role, elements, 8 * dtype.itemsize, dtype, None)
            for role, elements in (("input", rows * k), ("weight", n * k), ("output", results * n))
        ]
        product = work.product.model_copy(update={"n": n, "k": k})
        yield SiteWork(work.site, product, (tensors[0], tensors[1]), tensors[2], SUM_BITS, work.weight)


def _tensor(site: Site, role: str, elements: int, rows: torch.Size, dtype: torch.dtype) -> TensorWork:
    quantizer = site.standing(role)
    if role == "input2" and site.plan.value_axis == "head" and site.is_value_product:
        rows = torch.Size([*rows[:-2], rows[-1], rows[-2]])
    bits = None if quantizer is None or math.prod(rows) == 0 else quantizer.bits_per_element(rows)
    if bits is not None and role == "weight":
        bits *= 1 + site.appended / rows[-1]
    found = None if bits is None else quantizer.rounds_to
    return TensorWork(site.named(role), elements, bits or dtype.itemsize * 8, dtype, found)
