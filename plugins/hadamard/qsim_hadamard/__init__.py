"""Rotations: `hadamard()` spreads outliers over all channels, or over those of a block, before anything is rounded."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from qsim_core import Transform, hookimpl
from qsim_core.transforms.context import Context
from qsim_hadamard.attention import fold_values, rotate_scores, rotations_of_values
from qsim_hadamard.flatquant import FlatQuant as FlatQuant
from qsim_hadamard.maps import Rotation as Rotation
from qsim_hadamard.maps import rotation
from qsim_hadamard.matrices import hadamard as hadamard
from qsim_hadamard.matrices import signs as signs
from qsim_hadamard.rotatable import Size, fold_norms, survey
from qsim_hadamard.spinquant import SpinQuant as SpinQuant
from qsim_hadamard.wush import Wush as Wush


class Hadamard(Transform):
    """Rotates the input of every quantized matmul, and the other operand with it; the function stays.

    x W = (x D H)(Hᵀ D W): the weights are rotated once, the inputs in each forward. So it works on any model, with any
    norms, residuals and ties. `attention` rotates q and k, after any rotary embedding: q kᵀ = (q D H)(k D H)ᵀ.
    `fold_norms` first moves the norms' weights into the linears that read them, where the structure allows it and one
    of these is rotated. Source: QuaRot (arXiv 2404.00456), sections 3 and 4, with randomized Hadamard matrices as
    there.

    `size` makes H block-diagonal. Under `size=block` a block of H is a block of the formats, and no outlier reaches the
    scale of another block (BRQ, arXiv 2511.04214).

    Left alone, and reported, are sizes without a Hadamard matrix and convolutions. So are weights that are tied, used
    in two ways, read by another operator, or already on a grid.
    """

    name = "hadamard"
    seed: int | None = Field(0, ge=0, description="of the random signs; none: no signs")
    attention: bool = Field(True, description="rotate q and k too, along the head")
    fold_norms: bool = Field(True, description="move the norms' weights into the linears that read them first")
    size: Size = Field(
        "whole", description="of what is rotated together: whole (all of a row), block (a block of the formats), or n"
    )

    def apply(self, model: nn.Module, context: Context) -> None:
        """Rotate every weight that is quantized or whose input is, and say which were left alone, and why.

        Raises `RecipeError` after a transform that has put such a weight on its grid. So does a size that does not
        divide its inputs.
        """
        found = survey(self, self.size, model, context)
        if self.attention:
            rotate_scores(found, self.size, self.seed, context)
        if self.fold_norms:
            fold_norms(model, found, context)
        values = rotations_of_values(
            found, context, lambda head, size: None if head % size else rotation(head, self.seed, size)
        )
        done = fold_values(found, values, model, context)
        for weight in found.weights.values():
            if weight.name not in done:
                weight.turn(model, context, rotation(weight.length, self.seed, weight.size))


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [FlatQuant, Hadamard, SpinQuant, Wush]
