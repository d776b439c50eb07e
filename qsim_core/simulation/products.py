"""The products of each matmul by size, and how often each was computed."""

from __future__ import annotations

from collections import Counter, defaultdict

from pydantic import BaseModel, ConfigDict, Field

from qsim_core.matmuls.call import Call
from qsim_core.matmuls.size import Size, size_of
from qsim_core.sites.site import Site


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


class ProductCounter:
    """Counts the products that the sites compute, by size. Products of more than two operands are left out."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[Size]] = defaultdict(Counter)

    def __call__(self, site: Site, call: Call) -> None:
        """Count one call."""
        if len(call.operands) == 2:
            self._counts[site.name][size_of(call)] += 1

    def products(self, name: str) -> list[Product]:
        """Give the products of the site of this name, in the order in which their sizes were first met."""
        return [Product(**size._asdict(), calls=calls) for size, calls in self._counts[name].items()]
