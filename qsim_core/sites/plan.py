"""The quantizers and the arithmetic of one matmul, as a recipe plans them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from qsim_core.formats.quantizer import Quantizer
from qsim_core.operations.operation import Operation
from qsim_core.sites.arithmetic import AUTO, Arithmetic

ValueAxis = Literal["tokens", "head"]


@dataclass(frozen=True)
class Plan:
    """The quantizers of one matmul by role, and its arithmetic; None leaves a tensor unquantized."""

    weight: Quantizer | None = None
    input: Quantizer | None = None
    """The quantizer of the inputs, except those of attention's two products."""
    output: Quantizer | None = None
    queries: Quantizer | None = None
    keys: Quantizer | None = None
    probabilities: Quantizer | None = None
    values: Quantizer | None = None
    arithmetic: Arithmetic = AUTO
    value_axis: ValueAxis = "tokens"
    """The axis along which the scales of attention's values are shared."""
    skipped: bool = False
    """True if the recipe leaves this matmul alone."""
    own: frozenset[str] = field(default=frozenset(), compare=False)
    """The roles of attention that the recipe names; the others have the quantizer of the inputs."""


@dataclass(frozen=True)
class OperationPlan:
    """The quantizers of one operation between products, and its implementation; None leaves it as it is."""

    input: Quantizer | None = None
    output: Quantizer | None = None
    implementation: Operation | None = None

    @property
    def changes(self) -> bool:
        """True if the operation is not torch's own."""
        return self != OperationPlan()


class Planner(Protocol):
    """Gives each matmul its plan, as a `Recipe` does."""

    def plan(self, names: Iterable[str]) -> Plan:
        """Plan the matmul that has these names."""

    def to_yaml(self) -> str:
        """The recipe as text."""

    def check(self, matmuls: Iterable[tuple[Sequence[str], Collection[str]]]) -> None:
        """Raise `RecipeError` for a pattern that matches none of these matmuls, or a quantizer that reaches none.

        Each matmul is given by all its names, and the roles that it has.
        """
