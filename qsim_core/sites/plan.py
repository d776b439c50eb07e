"""The quantizers and the arithmetic of one matmul, as a recipe plans them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from qsim_core.formats.quantizer import Quantizer
from qsim_core.sites.arithmetic import AUTO, Arithmetic

ValueAxis = Literal["tokens", "head"]


@dataclass(frozen=True)
class Plan:
    """The quantizers at one matmul's sites; `skipped` if the recipe leaves the matmul alone."""

    weight: Quantizer | None = None
    input: Quantizer | None = None
    """The quantizer of an operand that has no quantizer of its own below."""
    output: Quantizer | None = None
    queries: Quantizer | None = None
    keys: Quantizer | None = None
    probabilities: Quantizer | None = None
    values: Quantizer | None = None
    arithmetic: Arithmetic = AUTO
    value_axis: ValueAxis = "tokens"
    """The axis along which the scales of attention's values are shared."""
    skipped: bool = False
    own: frozenset[str] = field(default=frozenset(), compare=False)
    """The roles of attention that the recipe names; the others have the quantizer of the inputs."""


class Planner(Protocol):
    """Gives each matmul its plan; a `Recipe` is one."""

    def plan(self, names: Iterable[str]) -> Plan:
        """The plan of the matmul with these names."""

    def to_yaml(self) -> str:
        """The recipe as text."""

    def check_patterns(self, names: Iterable[Iterable[str]]) -> None:
        """Raise `RecipeError` for a pattern that matches none of these matmuls, given by all their names."""
