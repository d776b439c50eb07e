"""Reciprocals and square roots by Newton's method."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from qsim_nonlinear.approximation import Approximation
from qsim_nonlinear.reduction import by_exponent


class Newton(Approximation):
    """Computes 1/x, 1/√x and √x by steps of Newton's method, in norms and softmax too: `newton(2)`.

    The number is brought into [1/2, 1), or [1/4, 1), by its exponent, and the first guess is a line. A step of 1/x is
    y (2 - x y); its line is 48/17 - 32/17 x. A step of 1/√x is y (3 - x y²) / 2. Its line goes through the values at
    both ends. √x is x / √x. Source: Muller, "Elementary Functions" (Birkhäuser, 3rd edition 2016), section 5.5.
    """

    name = "newton"
    computes = frozenset({"reciprocal", "rsqrt", "sqrt", "softmax", "layer_norm", "rms_norm", "group_norm"})
    inner: ClassVar[tuple[str, ...]] = ("reciprocal", "rsqrt")
    steps: int = Field(2, ge=0, le=8, description="steps of the method")

    def approximate(self, kind: str, exact: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if kind == "sqrt":
            root = x * self.approximate("rsqrt", torch.rsqrt, x)
            return torch.where(x.isfinite() & (x > 0), root, exact(x))
        reduced = by_exponent(kind, x.abs() if kind == "reciprocal" else x)
        assert reduced is not None
        number, restore, _ = reduced
        guess = 48 / 17 - 32 / 17 * number if kind == "reciprocal" else 7 / 3 - 4 / 3 * number
        for _ in range(self.steps):
            product = number * guess
            guess = guess * (2 - product) if kind == "reciprocal" else guess * (3 - product * guess) / 2
        found = restore(guess)
        if kind == "reciprocal":
            return torch.where(x.isfinite() & (x != 0), found.copysign(x), exact(x))
        return torch.where(x.isfinite() & (x > 0), found, exact(x))
