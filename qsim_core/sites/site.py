"""One matmul of a model, and the quantizers at its sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import RecipeError
from qsim_core.formats.quantizer import Quantizer
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.low_rank import LowRank
from qsim_core.sites.plan import Plan

OPERANDS = ("input", "input2")
"""The roles of operands that are not weights: the first, and the second of a product of activations."""
ATTENTION = {":qk": ("queries", "keys"), ":pv": ("probabilities", "values")}
"""The ending of an alias, and the recipe's names for the two operands of that product."""


@dataclass
class Site:
    """The sites of one matmul: its inputs, its weight if it has one, and its output."""

    name: str
    op: str
    """The operation: `linear`, `matmul`, `einsum`, …"""
    weight: str | None
    """The full name of the parameter that is the weight, or that it is computed from; None: two activations."""
    plan: Plan
    aliases: list[str] = field(default_factory=list)
    arithmetic: str = "float32"
    """The arithmetic that computed the last call; `float32` stands for the dtype of the model."""
    calls: int = 0
    """The number of calls, without those that recompute a forward in a backward pass."""
    computed: bool = False
    """True if the weight is computed from that parameter in each forward."""
    over_positions: bool = False
    """True for a grouped convolution: a row of its input is a group of channels at all positions."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """By role, the quantizer that replaces the plan's: static scales, a transform's choice, or None.

    Roles are "input", "input2" (the second operand of a product of activations), "weight" and "output".
    """

    rotations: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """By role, an orthogonal map along the reduction axis that a transform adds. It is applied before quantizing."""

    beside: LowRank | None = None
    """Two factors that a transform has taken out of the weight; what they give is added to the product."""

    in_training: Callable[[Call, int], Tensor] | None = None
    """A function of a call and its count that computes the call in training, in place of all quantizers."""

    @property
    def names(self) -> list[str]:
        """The name and the aliases."""
        return [self.name, *self.aliases]

    def named(self, role: str) -> str:
        """The recipe's name for a role: `keys` for the second operand of attention's first product."""
        if role not in OPERANDS:
            return role
        for alias in self.aliases:
            names = ATTENTION.get(alias[-3:])
            if names is not None:
                return names[OPERANDS.index(role)]
        return "input"

    def planned(self, role: str) -> Quantizer | None:
        """The quantizer that the recipe has for a role."""
        return getattr(self.plan, self.named(role))  # type: ignore[no-any-return]

    def standing(self, role: str) -> Any:
        """The quantizer of a role, with its static scales if they are found."""
        return self.fixed[role] if role in self.fixed else self.planned(role)

    def quantizer(self, role: str) -> Any:
        """The quantizer of a role, with its static scales. Raises `RecipeError` if these are needed and missing."""
        if role in self.fixed:
            return self.fixed[role]
        planned = self.planned(role)
        if planned is not None and planned.needs_held_scales(role):
            raise RecipeError(
                f"{self.name}: {planned} has no scale, as no calibration data reached it; give simulate(…, "
                f"calibration=batches), or --calibration-data"
            )
        return planned

    @property
    def input_roles(self) -> tuple[str, ...]:
        """The roles of the operands that are not weights."""
        return OPERANDS[:1] if self.weight else OPERANDS

    @property
    def recipe_roles(self) -> set[str]:
        """The recipe's names for the roles that this matmul has."""
        return {*map(self.named, self.input_roles), "output"} | ({"weight"} if self.weight else set())

    @property
    def inputs(self) -> list[Any]:
        """The quantizers of the operands that are not weights, each once."""
        found = map(self.standing, self.input_roles)
        return list({id(quantizer): quantizer for quantizer in found if quantizer is not None}.values())

    @property
    def appended(self) -> int:
        """The columns that the quantizer of the input appends to each row of both operands."""
        found = self.standing("input")
        return 0 if found is None else int(found.appended)

    def bits_beside(self, rows: torch.Size, bits: float) -> float:
        """Count the bits of what stands beside a weight [N, K] of so many bits: repeated columns, and two factors."""
        return bits * self.appended / max(rows[-1], 1) + (0 if self.beside is None else self.beside.bits)

    @property
    def changes_products(self) -> bool:
        """True if anything here makes a product of activations another than torch's."""
        standing = map(self.standing, (*OPERANDS, "output"))
        return (
            self.plan.arithmetic.simulates or self.in_training is not None or any(one is not None for one in standing)
        )

    @property
    def is_value_product(self) -> bool:
        """True for attention's product of probabilities and values."""
        return any(alias.endswith(":pv") for alias in self.aliases)
