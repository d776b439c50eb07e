"""One call of a matmul: its function, its arguments, its operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core.matmuls.layout import LAST, Layout

LINEAR = (F.linear, torch.addmm)
"""Calls that multiply by the rows of a weight and add a bias."""


@dataclass(frozen=True)
class Call:
    """One call of a matmul: its function, its arguments, and its two (or, for einsum, more) operands."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[Tensor, ...]
    layouts: tuple[Layout, ...]
    places: tuple[int | str, ...]
    addend: Tensor | None = None
    """The tensor that `addmm` and `baddbmm` add to the product."""
    result: Layout = LAST
    """The result, with the axis last that the next matmul will sum over."""
    operation: str = "einsum"
    weight: int | None = None
    """Which operand is a parameter, or part of one; known once a site has met the call."""
    masked: bool = False
    """True if the addend is computed, as a mask is, and not a parameter; it is added to the quantized product."""

    @property
    def input(self) -> Tensor:
        """The first operand that is no parameter, with its reduction axis last."""
        place = 1 if self.weight == 0 else 0
        return self.layouts[place].rows(self.operands[place].detach())

    @property
    def bias(self) -> Tensor | None:
        """What a call of `LINEAR`, or a convolution, adds to its product."""
        if self.function is torch.addmm:
            return self.addend
        bias: Tensor | None = self.kwargs.get("bias", self.args[2] if len(self.args) > 2 else None)
        return bias

    def run(self, operands: Sequence[Tensor]) -> Any:
        """The call with other operands in place; the very same call if they are the ones it has."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for place, operand in zip(self.places, operands, strict=True):
            if isinstance(place, int):
                args[place] = operand
            else:
                kwargs[place] = operand
        return self.function(*args, **kwargs)

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """The product alone, without what the call adds to it."""
        return torch.matmul(left, right)
