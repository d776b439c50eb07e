"""Functions of one number from a table: the nearest entry, or a line between two entries."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qsim_core import OperationCall, RecipeError
from qsim_nonlinear.approximation import Approximation
from qsim_nonlinear.reduction import TAILS, by_exponent

Function = Callable[[Tensor], Tensor]


class Tabulated(Approximation):
    """Approximates a function of one number from its values at `n` places of a range.

    sqrt, rsqrt, reciprocal and log are tabulated over the mantissa, and shifted by the exponent. Other functions are
    tabulated from `low` to `high`; outside, they are their limits: 0, x, 1 or -1, as each function has it. exp is
    tabulated up to 0, as a softmax needs it, and a larger number is an error unless `high` or `base` is given.
    Source of the method: Muller, "Elementary Functions" (Birkhäuser, 3rd edition 2016), chapters 6 and 11.
    """

    n: int = Field(ge=2, le=2**20, description="entries of the table")
    base: Literal[2] | None = Field(
        None, description="2: exp(x) is 2^(x log2 e), whose fraction is tabulated and whose whole part is a shift"
    )
    low: float | None = Field(None, description="lower end of the range; none: its own", allow_inf_nan=False)
    high: float | None = Field(None, description="upper end; none: its own", allow_inf_nan=False)

    @model_validator(mode="after")
    def _in_order(self) -> Tabulated:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low is below high, not {self.low:g} and {self.high:g}")
        return self

    @abstractmethod
    def look_up(self, function: Function, x: Tensor, low: float, high: float) -> Tensor:
        """Approximate a function of numbers between `low` and `high`."""

    def check(self, call: OperationCall) -> None:
        """Raise `RecipeError` for a softplus whose `beta` moves its range."""
        super().check(call)
        beta = call.kwargs.get("beta", call.args[1] if len(call.args) > 1 else 1)
        if call.operation == "softplus" and beta != 1:
            raise RecipeError(f"{self} tabulates softplus with beta 1, not {beta}")

    def approximate(self, kind: str, exact: Function, x: Tensor) -> Tensor:
        if kind == "reciprocal":
            found = self._magnitudes(kind, exact, x.abs())
            return torch.where(x.isfinite() & (x != 0), found.copysign(x), exact(x))
        return self._magnitudes(kind, exact, x)

    def _magnitudes(self, kind: str, exact: Function, x: Tensor) -> Tensor:
        if kind == "exp" and self.base == 2:
            reduced = by_exponent("exp2_of_fraction", x.clamp(-2000, 2000) / math.log(2))
            exact = torch.exp2
        else:
            reduced = by_exponent(kind, x)
        if reduced is not None:
            number, restore, (low, high) = reduced
            found = restore(self.look_up(exact, number, low, high))
            proper = x.isfinite() & ((x > 0) if kind != "exp" else (x > -1000))
            return torch.where(proper, found, exact(x) if kind != "exp" else torch.exp(x))
        return self._ranged(kind, exact, x)

    def _ranged(self, kind: str, exact: Function, x: Tensor) -> Tensor:
        tails = TAILS.get(kind)
        low = self.low if self.low is not None else None if tails is None else tails.low
        high = self.high if self.high is not None else None if tails is None else tails.high
        if low is None or high is None:
            raise RecipeError(f"{self} knows no range of {kind}; say low and high")
        found = self.look_up(exact, x.clamp(low, high), low, high)
        if tails is not None:
            found = torch.where(x < low, tails.below, found)
        if tails is not None and tails.above == math.inf:
            if self.high is None and bool((x > high).any()):
                raise RecipeError(f"{self} is given {kind} of {float(x.max()):g}, above its range; say high, or base=2")
        elif tails is not None:
            found = torch.where(x > high, x if tails.above is None else x.new_tensor(tails.above), found)
        return torch.where(x.isnan(), x, found)


class Table(Tabulated):
    """A function of one number as the nearest of `n` entries, at equal steps over the range: `table(256)`.

    The range has n cells, and an entry is the function in the middle of its cell.
    """

    name = "table"

    def look_up(self, function: Function, x: Tensor, low: float, high: float) -> Tensor:
        step = (high - low) / self.n
        cells = torch.arange(self.n, dtype=torch.float64, device=x.device)
        entries = function((low + (cells + 0.5) * step).to(x.dtype))
        return entries[((x.nan_to_num() - low) / step).long().clamp(0, self.n - 1)]


class Piecewise(Tabulated):
    """A function of one number as `n` lines of equal width over the range: `piecewise(16)`.

    The lines meet at the function's own values.
    """

    name = "piecewise"

    def look_up(self, function: Function, x: Tensor, low: float, high: float) -> Tensor:
        step = (high - low) / self.n
        knots = torch.arange(self.n + 1, dtype=torch.float64, device=x.device)
        values = function((low + knots * step).to(x.dtype))
        place = (x.nan_to_num() - low) / step
        cell = place.long().clamp(0, self.n - 1)
        return torch.lerp(values[cell], values[cell + 1], (place - cell).to(x.dtype))
