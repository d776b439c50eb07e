"""Layouts: views of an operand with its reduction axis last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Views of an operand: `rows` brings its reduction axis last, `back` undoes that; `name` tells layouts apart."""

    name: str
    rows: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _swap(x: Tensor) -> Tensor:
    return x.transpose(-1, -2) if x.dim() > 1 else x


LAST = Layout("last", _same, _same)


SECOND_LAST = Layout("second last", _swap, _swap)


def layout_of(parameter: Tensor, operand: Tensor, layout: Layout) -> Layout | None:
    """How the whole of a parameter is laid out of which an operand is a view: its columns are the operand's columns.

    None where the operand has a part of the columns only, or none of these axes.
    """
    rows = layout.rows(operand)
    for candidate in (layout, LAST, SECOND_LAST):
        whole = candidate.rows(parameter)
        if whole.shape[-1] == rows.shape[-1] and whole.stride(-1) == rows.stride(-1):
            return candidate
    return None


def taps(weight: Tensor, outputs: int = 0, groups: int = 1) -> Layout:
    """A kernel as one row for each output channel: `[groups, outputs, taps * inputs]`, inputs fastest.

    `outputs` is the axis of the output channels: 0 in `[O, I/groups, *taps]`, 1 in a transposed convolution's
    `[I, O/groups, *taps]`, where the groups divide the inputs.
    """
    split = weight.unflatten(
        0, (groups, -1)
    )  # [groups, O/groups, I/groups, *taps] or [groups, I/groups, O/groups, *taps]
    order = (0, 1, *range(3, split.dim()), 2) if outputs == 0 else (0, 2, *range(3, split.dim()), 1)
    inverse = tuple(order.index(axis) for axis in range(split.dim()))
    permuted = split.permute(order).shape

    def rows(t: Tensor) -> Tensor:
        grouped: Tensor = t.unflatten(0, (groups, -1))
        return grouped.permute(order).flatten(2)

    def back(t: Tensor) -> Tensor:
        return t.reshape(permuted).permute(inverse).flatten(0, 1)

    return Layout(f"taps {outputs} {groups}", rows, back)
