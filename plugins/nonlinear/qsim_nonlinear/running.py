"""The state of the operations of a running module: their counts, and the products of elements that a sum may add."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from qsim_core.sites.call_stack import Frame


class Scaled(NamedTuple):
    """A product of elements, its factors, and their versions."""

    product: Tensor
    factors: tuple[Tensor, Tensor]
    versions: tuple[int, ...]


@dataclass
class Running:
    """The operations of one running module so far."""

    counts: dict[str, int] = field(default_factory=functools.partial(defaultdict, int))
    """The number of operations, by kind."""
    around: tuple[str, ...] = ()
    """The names of the operation whose written-out form is being computed."""
    scaled: list[Scaled] = field(default_factory=list)
    """The last two products of elements: a rotary embedding adds them."""

    @classmethod
    def of(cls, frame: Frame) -> Running:
        """The state of a module, which its frame keeps."""
        if frame.operations is None:
            frame.operations = cls()
        found: Running = frame.operations
        return found

    def remember(self, product: Tensor, factors: tuple[Tensor, Tensor]) -> None:
        """Remember a product of elements as it is now."""
        self.scaled = [*self.scaled[-1:], Scaled(product, factors, _versions(product, *factors))]

    def factors(self, product: Tensor) -> tuple[Tensor, Tensor] | None:
        """The factors of one of the last two products of elements, if nothing was written to them since."""
        for scaled in self.scaled:
            if scaled.product is product:
                return scaled.factors if scaled.versions == _versions(product, *scaled.factors) else None
        return None


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(0 if x.is_inference() else x._version for x in tensors)
