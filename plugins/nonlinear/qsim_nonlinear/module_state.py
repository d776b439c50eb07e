"""The state of the operations of a running module: their counts, and the products of elements that a sum may add."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from qsim_core import OperationCall
from qsim_core.sites.call_stack import Frame
from qsim_core.sites.operation_sites import OperationSite


class Scaled(NamedTuple):
    """A product of elements, or a sum of two of them, its factors, and their versions."""

    product: Tensor
    factors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, product: Tensor, factors: tuple[Tensor, ...]) -> Scaled:
        """Remember a product as it is now."""
        return cls(product, factors, _versions(product, *factors))

    def factors_of(self, product: Tensor) -> tuple[Tensor, ...] | None:
        """The factors, if this is the product, and nothing was written to it and to them since."""
        holds = self.product is product and self.versions == _versions(product, *self.factors)
        return self.factors if holds else None


@dataclass
class Running:
    """The operations of one running module so far."""

    counts: dict[str, int] = field(default_factory=functools.partial(defaultdict, int))
    """The number of operations, by kind."""
    around: tuple[str, ...] = ()
    """The names of the operation whose written-out form is being computed."""
    scaled: list[Scaled] = field(default_factory=list)
    """The last two products of elements: a rotary embedding adds them."""
    halves: dict[str, Scaled] = field(default_factory=dict)
    """The last difference and the last sum of two products (`sub`, `add`): a split rotary embedding joins them."""
    norm: tuple[OperationSite, OperationCall] | None = None
    """The site and the call of the norm that the module is, written out in Python."""

    @classmethod
    def of(cls, frame: Frame) -> Running:
        """The state of a module, which its frame keeps."""
        if frame.operations is None:
            frame.operations = cls()
        found: Running = frame.operations
        return found

    def remember(self, product: Tensor, factors: tuple[Tensor, Tensor]) -> None:
        """Remember a product of elements as it is now."""
        self.scaled = [*self.scaled[-1:], Scaled.of(product, factors)]

    def remember_half(self, kind: str, terms: tuple[Any, ...], result: Any) -> None:
        """Remember a difference or a sum, if its terms are the last two products of elements."""
        if len(terms) == 2 and len(self.scaled) == 2 and isinstance(result, Tensor):
            first, second = map(self.factors, terms)
            if first is not None and second is not None:
                self.halves[kind] = Scaled.of(result, (*first, *second))

    def factors(self, product: Tensor) -> tuple[Tensor, ...] | None:
        """The factors of one of the last two products of elements, if nothing was written to them since."""
        return next((found for one in self.scaled if (found := one.factors_of(product)) is not None), None)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(0 if x.is_inference() else x._version for x in tensors)
