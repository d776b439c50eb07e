"""Rotations: `hadamard()` spreads outliers over all channels, or over those of a block, before anything is rounded."""

from __future__ import annotations

import functools
from contextlib import ExitStack

from pydantic import Field
from qsim_structure.for_transforms import rotatable_values, rotate_values, structure_of
from torch import nn

from qsim_core import Transform, hookimpl
from qsim_core.transforms.context import Context
from qsim_hadamard.maps import Rotation as Rotation
from qsim_hadamard.matrices import hadamard as hadamard
from qsim_hadamard.matrices import signs as signs
from qsim_hadamard.matrices import unknown
from qsim_hadamard.rotatable import Size, Survey, fold_norms, free, length_along, survey
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
            self._rotate_scores(found, context)
        if self.fold_norms:
            groups = structure_of(context).groups
            fold_norms(model, [g for g in groups if not found.weights.keys().isdisjoint(g.weights)], context)
        done = self._rotate_values(found, model, context)
        for weight in found.weights.values():
            if weight.name not in done:
                weight.turn(model, context, rotation(weight.length, self.seed, weight.size))

    def _rotate_values(self, found: Survey, model: nn.Module, context: Context) -> set[str]:
        """Fold the rotation of what attention gives into v, where it stays within heads; name the weights behind v."""
        fitting = {}
        for attention in structure_of(context).attention:
            sizes = {found.size_behind(use.weight) for use in attention.value.uses}
            size = sizes.pop() if len(sizes) == 1 else None
            if size and attention.head_size % size == 0 and free(attention.value.producer, context):
                fitting[attention] = rotation(attention.head_size, self.seed, size)
        done: set[str] = set()
        for attention, reason in rotatable_values(context, fitting).items() if fitting else ():
            if not reason:
                value, readers = attention.value, sorted({use.weight for use in attention.value.uses})
                note = f"the rotation of its input is folded into {value.producer}"
                with ExitStack() as reports:
                    for name in readers:
                        reports.enter_context(found.weights[name].reported(model, context, note))
                    rotate_values(model, value, fitting[attention])
                done.update(readers)
        return done

    def _rotate_scores(self, found: Survey, context: Context) -> None:
        """Rotate q and k in each forward. A size that is longer than a head is a head."""
        for site in context.all_sites:
            if not site.plan.input or site.rotations or not any(alias.endswith(":qk") for alias in site.aliases):
                continue
            head = found.lengths[site.name]
            blocks = length_along(self.size, head, map(site.planned, ("input", "input2")))
            size = min(blocks or head, head)
            reason = unknown(size) if head % size == 0 else f"{size} does not divide the {head} channels of a head"
            if reason is None:
                site.rotations = dict.fromkeys(("input", "input2"), rotation(head, self.seed, size))
            else:
                context.report(site.name, note=f"left alone: {reason}")


@functools.lru_cache(maxsize=256)
def rotation(length: int, seed: int | None, size: int) -> Rotation:
    """One object for each kind of rotation, so that q, k and v share the rotated input."""
    return Rotation(length, seed, None if size == length else size)


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [Hadamard, Wush]
