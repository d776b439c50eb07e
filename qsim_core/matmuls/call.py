"""One call of a matmul: the function, the arguments, and the operands among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core.matmuls.layout import LAST, Layout

LINEAR = (F.linear, torch.addmm)
"""The functions that multiply by a weight and add a bias."""
FIRST = (0, 1)
"""The places of two operands that are the first arguments."""


@dataclass(frozen=True)
class Call:
    """One call of a matmul, with its two operands; an einsum may have more."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[Tensor, ...]
    layouts: tuple[Layout, ...]
    """The layout of each operand, with its reduction axis last."""
    places: tuple[int | str, ...]
    """The place of each operand: an index into `args`, or a key of `kwargs`."""
    addend: Tensor | None = None
    """The tensor that `addmm`, `addmv` and `baddbmm` add to the product."""
    result: Layout = LAST
    """The layout of the result: the axis that the next matmul sums over is last."""
    operation: str = "einsum"
    """The name of the function, without underscores at its ends."""
    labels: tuple[str, ...] = ()
    """The labels of an einsum: a letter for each axis of the operands, and of the result."""
    weight: int | None = None
    """The index of the operand that is a parameter, or part of one. None until a site has found it."""
    masked: bool = False
    """True if the addend is computed, like a mask, and is not a parameter. It is added to the quantized product."""
    beside: Tensor | None = None
    """The product of the factors beside the weight, which is added to the result; None: there are none."""

    @property
    def input(self) -> Tensor:
        """The first operand that is not a parameter, with its reduction axis last."""
        place = 1 if self.weight == 0 else 0
        return self.layouts[place].rows(self.operands[place].detach())

    @property
    def is_outer(self) -> bool:
        """True if the reduction axis has one element: an outer product, which adds nothing up."""
        return all(layout.rows(x).shape[-1] == 1 for layout, x in zip(self.layouts, self.operands, strict=True))

    @property
    def is_layer(self) -> bool:
        """True for a function that layers call: it multiplies by a weight and adds a bias."""
        return self.function in LINEAR or self.operation.startswith("conv")

    @property
    def bias(self) -> Tensor | None:
        """The tensor that a call of `LINEAR`, or a convolution, adds to its product."""
        if self.function is torch.addmm:
            return self.addend
        positional = self.args[2] if len(self.args) > 2 else None
        bias: Tensor | None = self.kwargs.get("bias", positional)
        return bias

    def again(self, args: tuple[Any, ...], operands: tuple[Tensor, ...]) -> Call:
        """The same call with other tensors, in less time than `dataclasses.replace` takes."""
        other = object.__new__(type(self))
        known = vars(other)
        known.update(vars(self))
        known["args"], known["operands"] = args, operands
        return other

    def run(self, operands: Sequence[Tensor]) -> Any:
        """Call the function with these operands in place of its own; all other arguments stay."""
        if self.places == FIRST and not self.kwargs:
            return self.with_beside(self.function(*operands, *self.args[2:]))
        args, kwargs = list(self.args), dict(self.kwargs)
        for place, operand in zip(self.places, operands, strict=True):
            if isinstance(place, int):
                args[place] = operand
            else:
                kwargs[place] = operand
        return self.with_beside(self.function(*args, **kwargs))

    def with_beside(self, product: Any) -> Any:
        """Add the product of the factors beside the weight, if there are any."""
        return product if self.beside is None else product + self.beside

    def exact(self) -> Any:
        """Call the function with its own operands."""
        return self.run(self.operands)

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """Compute the product alone, without a bias or an addend."""
        return torch.matmul(left, right)
