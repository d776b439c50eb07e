"""Layouts: views of an operand as rows x K, with K, the axis that the matmul sums over, last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A pair of views: `rows` brings the reduction axis of an operand last, and `back` undoes that.

    `name` tells layouts apart.
    """

    name: str
    rows: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _swap(x: Tensor) -> Tensor:
    return x.transpose(-1, -2) if x.dim() > 1 else x


LAST = Layout("last", _same, _same)
"""The reduction axis is the last one, as in a linear layer's input `[..., K]` and weight `[N, K]`."""

SECOND_LAST = Layout("second last", _swap, _swap)
"""The reduction axis is the last but one, as in the second operand of a matrix product, `[..., K, N]`."""


def along(axis: int) -> Layout:
    """The layout of an operand whose reduction axis is this one."""
    return Layout(f"along {axis}", lambda t: t.movedim(axis, -1), lambda t: t.movedim(-1, axis))


POSITIONS = "positions"
"""The beginning of the name of a layout whose rows hold several positions of an image, or tokens of a sequence."""


def holds_experts(weight: Tensor, layout: Layout) -> bool:
    """Tell if a weight of three axes holds one matrix for each expert of a layer."""
    return weight.dim() == 3 and layout in (LAST, SECOND_LAST)


def channels(space: int) -> Layout:
    """The layout of a convolution's image: `[B, C, *space]` as `[B, 1, *space, C]`, a row for each position.

    `space` is the number of spatial dimensions. B may be missing. The axis of size 1 is kept: without it a quantized
    image gets another order in memory, and a convolution adds up in another order.
    """

    def rows(t: Tensor) -> Tensor:
        one_group: Tensor = t.unflatten(-1 - space, (1, -1))
        return one_group.movedim(-1 - space, -1)

    def back(t: Tensor) -> Tensor:
        return t.movedim(-1, -1 - space).flatten(-2 - space, -1 - space)

    return Layout(f"channels {space}", rows, back)


def positions(image: Tensor, space: int, groups: int) -> Layout:
    """The layout of a grouped convolution's image: `[B, C, *space]` as `[B, groups, positions * C / groups]`.

    The row of one position would hold fewer elements than a token: of a depthwise convolution a single one, which its
    own scale makes exact. So a row is a group at all positions, its channels fastest. Its scale can be taken out of the
    sum over the taps.
    """
    sizes = image.shape[-space:]

    def rows(t: Tensor) -> Tensor:
        grouped: Tensor = t.unflatten(-1 - space, (groups, -1))
        return grouped.movedim(-1 - space, -1).flatten(-1 - space)

    def back(t: Tensor) -> Tensor:
        unflattened: Tensor = t.unflatten(-1, (*sizes, -1))
        return unflattened.movedim(-1, -1 - space).flatten(-2 - space, -1 - space)

    return Layout(f"{POSITIONS} {space} {groups}", rows, back)


def taps(weight: Tensor, outputs: int = 0, groups: int = 1) -> Layout:
    """The layout of a convolution's kernel: `[groups, O / groups, taps * inputs]`, the inputs fastest.

    `outputs` is the axis of the output channels: 0 in `[O, I/groups, *taps]`, and 1 in a transposed convolution's
    `[I, O/groups, *taps]`, where the groups divide the inputs.
    """
    split = weight.unflatten(0, (groups, -1))
    # split is [groups, O/groups, I/groups, *taps], or [groups, I/groups, O/groups, *taps] if transposed
    order = (0, 1, *range(3, split.dim()), 2) if outputs == 0 else (0, 2, *range(3, split.dim()), 1)
    inverse = tuple(order.index(axis) for axis in range(split.dim()))
    permuted = split.permute(order).shape

    def rows(t: Tensor) -> Tensor:
        grouped: Tensor = t.unflatten(0, (groups, -1))
        return grouped.permute(order).flatten(2)

    def back(t: Tensor) -> Tensor:
        return t.reshape(permuted).permute(inverse).flatten(0, 1)

    return Layout(f"taps {outputs} {groups}", rows, back)


def layout_of(parameter: Tensor, operand: Tensor, layout: Layout) -> Layout | None:
    """Find the layout of a whole parameter with the same columns as an operand, which is a view of it in `layout`.

    None if the operand has a part of the columns only, or columns along another axis.
    """
    rows = layout.rows(operand)
    own: tuple[Layout, ...] = (layout,) if operand.dim() == parameter.dim() else ()
    for candidate in (*own, LAST, SECOND_LAST):
        whole = candidate.rows(parameter)
        if whole.shape[-1] == rows.shape[-1] and whole.stride(-1) == rows.stride(-1):
            return candidate
    return None
