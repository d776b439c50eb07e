"""Rotations inside attention: of q with k in the forward, of v with the weights behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TypeVar

from qsim_structure import Attention
from qsim_structure.for_transforms import rotatable_values, rotate_values, structure_of
from torch import nn

from qsim_core.transforms.context import Context
from qsim_hadamard.maps import Map, rotation
from qsim_hadamard.matrices import unknown
from qsim_hadamard.rotatable import Size, Survey, free, length_along


def rotate_scores(found: Survey, size: Size, seed: int | None, context: Context) -> None:
    """Rotate q and k in each forward. A size that is longer than a head is a head."""
    for site in context.all_sites:
        if not site.plan.input or site.rotations or not any(alias.endswith(":qk") for alias in site.aliases):
            continue
        head = found.lengths[site.name]
        along = min(length_along(size, head, map(site.planned, ("input", "input2"))) or head, head)
        reason = unknown(along) if head % along == 0 else f"{along} does not divide the {head} channels of a head"
        if reason is None:
            site.rotations = dict.fromkeys(("input", "input2"), rotation(head, seed, along))
        else:
            context.report(site.name, note=f"left alone: {reason}")


M = TypeVar("M", bound=Map)


def rotations_of_values(found: Survey, context: Context, make: Callable[[int, int], M | None]) -> dict[Attention, M]:
    """Make a rotation for each v, from the size of a head and the size behind v, where the function stays.

    `make` gives None where the sizes do not fit. The weights of v may be changed, and all that read it may be mapped.
    """
    rotations: dict[Attention, M] = {}
    for attention in structure_of(context).attention:
        sizes = {found.size_behind(use.weight) for use in attention.value.uses}
        size = sizes.pop() if len(sizes) == 1 else None
        if size and free(attention.value.producer, context) and (made := make(attention.head_size, size)):
            rotations[attention] = made
    reasons = rotatable_values(context, rotations) if rotations else {}
    return {attention: made for attention, made in rotations.items() if not reasons[attention]}


def fold_values(found: Survey, rotations: Mapping[Attention, Map], model: nn.Module, context: Context) -> set[str]:
    """Rotate v and the weights behind it, within heads. Returns the names of the weights behind it."""
    done: set[str] = set()
    for attention, made in rotations.items():
        readers = names_behind(attention)
        with ExitStack() as reports:
            for name in readers:
                reports.enter_context(found.weights[name].reported(model, context, note_of(attention)))
            rotate_values(model, attention.value, made)
        done.update(readers)
    return done


def names_behind(attention: Attention) -> list[str]:
    """The weights that read v."""
    return sorted({use.weight for use in attention.value.uses})


def note_of(attention: Attention) -> str:
    """The note of a report on a weight behind v."""
    return f"the rotation of its input is folded into {attention.value.producer}"
