"""One operand of a matmul at its site: its role, its layout, its quantizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST, Layout, holds_experts
from qsim_core.quantizers.stacked import Stacked
from qsim_core.sites.quantized_weights import Weight
from qsim_core.sites.site import Site


@dataclass
class Operand:
    """A tensor that a matmul multiplies, as the site sees it. Nothing changes it: a frozen class is made too slowly."""

    role: str
    """ "input", "input2" (the second operand of a product of activations) or "weight"."""
    tensor: Tensor
    layout: Layout
    """The view of the tensor as rows, whose columns share scales: the reduction axis is last by default.

    With the recipe's `value_axis` of `head`, the values of attention have their head dimension last instead.
    """
    quantizer: Any = None
    weight: Weight | None = None

    @property
    def rows(self) -> Tensor:
        """The tensor as rows [..., K], a view."""
        return self.layout.rows(self.tensor)


def roles_of(weights: Sequence[Any]) -> list[str]:
    """The role of each operand of a call; `weights` has None for an operand that is not a weight."""
    weighted = any(weight is not None for weight in weights)
    return [
        "weight" if weight is not None else "input2" if place and not weighted else "input"
        for place, weight in enumerate(weights)
    ]


def operands_of(
    site: Site, call: Call, weights: Sequence[Weight | None], quantizer_of: Callable[[str], Any]
) -> tuple[Operand, ...]:
    """The operands of a call at a site, each with the quantizer that `quantizer_of(role)` gives.

    A weight of three axes holds the experts of a layer. A quantizer that does not round row by row is applied to each
    expert by itself.
    """
    operands = []
    for role, tensor, layout, weight in zip(roles_of(weights), call.operands, call.layouts, weights, strict=True):
        if role == "input2" and site.plan.value_axis == "head" and site.is_value_product:
            layout = LAST
        quantizer = quantizer_of(role)
        experts = role == "weight" and holds_experts(tensor, layout)
        if quantizer is not None and experts and not quantizer.by_rows:
            quantizer = Stacked(each=quantizer)
        operands.append(Operand(role, tensor, layout, quantizer, weight))
    return tuple(operands)
