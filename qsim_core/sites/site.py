"""One matmul of a model, and the quantizers at its sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qsim_core.errors import RecipeError
from qsim_core.formats.quantizer import Quantizer
from qsim_core.matmuls.call import Call
from qsim_core.sites.plan import Plan


@dataclass
class Site:
    """The sites of one matmul: its inputs, its weight if it has one, its output."""

    name: str
    op: str
    weight: str | None
    """Full name of the parameter that is its weight."""
    plan: Plan
    aliases: list[str] = field(default_factory=list)
    path: str = "float32"
    """The arithmetic of its last call: float32 stands for the model's own, see `qsim_core.fast.lowering`."""
    calls: int = 0
    """How often it was met, recomputation in a backward pass not counted."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """By role ("input", "input2" for the other operand of a product of activations, "output") what stands in place of
    the plan's quantizer: static scales, a transform's choice, or None for nothing."""

    rotations: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """By role, an orthogonal map along the reduction axis that an input goes through before all else: a transform put
    it there, and its inverse into the other operand."""

    in_training: Callable[[Call, int], Tensor] | None = None
    """What computes it, call by call (a count), while the module that runs it is in training, in place of all
    quantizers: a transform put it there."""

    @property
    def names(self) -> list[str]:
        return [self.name, *self.aliases]

    def planned(self, role: str) -> Quantizer | None:
        """The quantizer that the recipe has for a role."""
        return getattr(self.plan, role.rstrip("2"))  # type: ignore[no-any-return]

    def quantizer(self, role: str) -> Any:
        """The same, with its static scales. Raises `RecipeError` where it wants some and none were found."""
        planned = self.planned(role)
        if role in self.fixed:
            return self.fixed[role]
        if getattr(planned, "learns", False) or (getattr(planned, "static", False) and role != "weight"):
            raise RecipeError(
                f"{self.name}: {planned} has no scale, as no calibration data reached it; give simulate(…, "
                f"calibration=batches), or --calibration-data"
            )
        return planned

    @property
    def inputs(self) -> list[Any]:
        """The quantizers of its operands that are no weight, each once."""
        roles = ("input",) if self.weight else ("input", "input2")
        found = [self.fixed.get(role, self.plan.input) for role in roles]
        return list({id(quantizer): quantizer for quantizer in found if quantizer is not None}.values())

    @property
    def is_value_product(self) -> bool:
        return any(alias.endswith(":pv") for alias in self.aliases)
