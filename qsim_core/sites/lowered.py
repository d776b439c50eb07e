"""What operands are turned into for another arithmetic than float32's, and what multiplies them there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from qsim_core.matmuls.call import Call


class Lowered(Protocol):
    """An operand's rows in the form of another arithmetic."""

    def values(self) -> Tensor:
        """The rows again, quantized, in float32."""


class Form(ABC):
    """One kind of product. Where a form is not exact for an operand, its methods give None."""

    path: ClassVar[str]
    """The arithmetic, as audits name it."""

    def __init__(self, quantizers: Sequence[Any]) -> None:
        self.quantizers = quantizers
        """Of the two operands."""

    @property
    def key(self) -> tuple[Any, ...]:
        """The path, and whatever else tells its operands from those of others of this path."""
        return (self.path,)

    def of(self, place: int) -> tuple[Any, ...]:
        """What decides what an operand at this place becomes."""
        return *self.key, self.quantizers[place]

    @abstractmethod
    def take(self, place: int, rows: Tensor) -> Any:
        """An operand's rows [..., K], quantized, in this form."""

    def new(self, rows: Tensor) -> Any:
        """A weight's rows [N, K], quantized, in this form."""
        return self.take(1, rows)

    @abstractmethod
    def again(self, rows: Tensor, kept: Any) -> Any:
        """Of a weight's rows that were overwritten with their quantized values, by what `keep` has kept."""

    def pinned(self, rows: Tensor, scales: Any) -> Any:
        """Of a weight's rows that a transform has put on their grid, under these scales (None: it did not say)."""
        return None if scales is None else self.again(rows, scales)

    def keep(self, made: Any) -> Any:
        """What `again` needs to know of what `new` made."""
        return made.scales

    @abstractmethod
    def product(self, call: Call, first: Any, second: Any) -> Tensor | None:
        """The call's product, a bias in it, in float32."""
