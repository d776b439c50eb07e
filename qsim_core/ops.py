"""The matmuls of torch: which arguments are operands, and where their reduction axis lies.

A quantizer sees an operand as rows x K with K, the axis that the matmul sums over, last. A `Layout` turns an
operand that way and back. Convolutions reduce over the input channels and the taps of the kernel: weights are
rows of (taps, channels), inputs are laid out with their channels last, and groups are kept apart.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core.errors import QsimError


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
    """What `addmm` and `baddbmm` add the product to."""
    result: Layout = LAST
    """The result, with the axis last that the next matmul will sum over."""
    operation: str = "einsum"
    weight: int | None = None
    """Which operand is a parameter, or part of one; known once a site has met the call."""

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


@dataclass(frozen=True)
class Op:
    """How to read the arguments of one function: their names in order, the operands, and the operands' layouts."""

    parameters: tuple[str, ...]
    operands: tuple[str, str]
    layouts: Callable[[dict[str, Any]], tuple[Layout, Layout]]
    addend: str | None = None
    space: int = 0
    """Spatial dimensions of a convolution, whose channels stand before them."""

    def read(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The operands of a call of this operator, positional or by keyword."""
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        places = tuple(self._place(name, len(args)) for name in self.operands)
        tensors = tuple(named[name] for name in self.operands)
        addend = named.get(self.addend) if self.addend else None
        result = _channels(self.space, groups=1) if self.space else LAST
        operation = function.__name__.strip("_")
        return Call(function, args, kwargs, tensors, self.layouts(named), places, addend, result, operation)

    def _place(self, name: str, positional: int) -> int | str:
        index = self.parameters.index(name)
        return index if index < positional else name


def _constant(left: Layout, right: Layout) -> Callable[[dict[str, Any]], tuple[Layout, Layout]]:
    return lambda named: (left, right)


def _conv(space: int, outputs: int) -> Callable[[dict[str, Any]], tuple[Layout, Layout]]:
    def layouts(named: dict[str, Any]) -> tuple[Layout, Layout]:
        groups = named.get("groups", 1)
        return _channels(space, groups), taps(named["weight"], outputs, groups)

    return layouts


def _channels(space: int, groups: int) -> Layout:
    """`[B, C, *space]` (B may be missing) as `[B, groups, *space, C / groups]`."""

    def rows(t: Tensor) -> Tensor:
        grouped: Tensor = t.unflatten(-1 - space, (groups, -1))
        return grouped.movedim(-1 - space, -1)

    def back(t: Tensor) -> Tensor:
        return t.movedim(-1, -1 - space).flatten(-2 - space, -1 - space)

    return Layout(f"channels {space} {groups}", rows, back)


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


_LINEAR = Op(("input", "weight", "bias"), ("input", "weight"), _constant(LAST, LAST))
_MATMUL = Op(("input", "other"), ("input", "other"), _constant(LAST, SECOND_LAST))
_RMATMUL = Op(("other", "input"), ("input", "other"), _constant(LAST, SECOND_LAST))
_MM = Op(("input", "mat2"), ("input", "mat2"), _constant(LAST, SECOND_LAST))
_INNER = Op(("input", "other"), ("input", "other"), _constant(LAST, LAST))
_GROUPED = Op(("mat_a", "mat_b", "offs"), ("mat_a", "mat_b"), _constant(LAST, SECOND_LAST))
GROUPED = [getattr(home, name) for home, name in ((torch, "_grouped_mm"), (F, "grouped_mm")) if hasattr(home, name)]
_ADDMV = Op(("input", "mat", "vec"), ("mat", "vec"), _constant(LAST, LAST), addend="input")
_MV = Op(("input", "vec"), ("input", "vec"), _constant(LAST, LAST))
_ADDMM = Op(("input", "mat1", "mat2"), ("mat1", "mat2"), _constant(LAST, SECOND_LAST), addend="input")
_BADDBMM = Op(("input", "batch1", "batch2"), ("batch1", "batch2"), _constant(LAST, SECOND_LAST), addend="input")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

OPS: dict[Callable[..., Any], Op] = {
    F.linear: _LINEAR,
    torch.matmul: _MATMUL,
    torch.Tensor.matmul: _MATMUL,
    torch.Tensor.__matmul__: _MATMUL,
    torch.Tensor.__rmatmul__: _RMATMUL,
    torch.linalg.matmul: _MATMUL,
    torch.mm: _MM,
    torch.Tensor.mm: _MM,
    torch.bmm: _MM,
    torch.Tensor.bmm: _MM,
    torch.mv: _MV,
    torch.Tensor.mv: _MV,
    torch.inner: _INNER,
    torch.Tensor.inner: _INNER,
    torch.dot: _INNER,
    torch.Tensor.dot: _INNER,
    torch.addmv: _ADDMV,
    torch.Tensor.addmv: _ADDMV,
    torch.addmm: _ADDMM,
    torch.Tensor.addmm: _ADDMM,
    torch.baddbmm: _BADDBMM,
    torch.Tensor.baddbmm: _BADDBMM,
    **dict.fromkeys(GROUPED, _GROUPED),
    F.conv1d: Op(_CONV, ("input", "weight"), _conv(1, outputs=0), space=1),
    F.conv2d: Op(_CONV, ("input", "weight"), _conv(2, outputs=0), space=2),
    F.conv3d: Op(_CONV, ("input", "weight"), _conv(3, outputs=0), space=3),
    F.conv_transpose1d: Op(_CONV_TRANSPOSE, ("input", "weight"), _conv(1, outputs=1), space=1),
    F.conv_transpose2d: Op(_CONV_TRANSPOSE, ("input", "weight"), _conv(2, outputs=1), space=2),
    F.conv_transpose3d: Op(_CONV_TRANSPOSE, ("input", "weight"), _conv(3, outputs=1), space=3),
}


def read_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The matmul that a call is, or None if it is none."""
    if function is torch.einsum:
        return _einsum(args)
    op = OPS.get(function)
    return op.read(function, args, kwargs) if op else None


def _einsum(args: tuple[Any, ...]) -> Call | None:
    """`einsum("bqd,bkd->bqk", q, k)`: each operand's summed labels, in the order they stand there, are its K.

    An operand without a summed label has its last axis last; one operand alone is no matmul.
    """
    if not isinstance(args[0], str):  # einsum(x, [0, 1], y, [1, 2], [0, 2])
        args = _from_sublists(args)
    equation, *operands = args
    tensors = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else tuple(operands)
    if len(tensors) < 2:
        return None
    inputs, _, output = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(tensors):
        raise QsimError(f"einsum {equation!r} names {len(terms)} operands and is given {len(tensors)}")
    if "->" not in str(equation):
        labels = [label for label in inputs if label.isalpha()]
        output = "..." + "".join(sorted(label for label in set(labels) if labels.count(label) == 1))
    layouts = tuple(_summed_last(term, output, tensor.shape) for term, tensor in zip(terms, tensors, strict=True))
    function = lambda *new: torch.einsum(equation, *new)  # noqa: E731
    return Call(function, tensors, {}, tensors, layouts, tuple(range(len(tensors))))


def _from_sublists(args: tuple[Any, ...]) -> tuple[Any, ...]:
    operands, sublists = args[: len(args) // 2 * 2 : 2], args[1::2]
    letters = string.ascii_letters

    def spell(sublist: Sequence[Any]) -> str:
        return "".join("..." if label is Ellipsis else letters[label] for label in sublist)

    equation = ",".join(spell(sublist) for sublist in sublists)
    if len(args) % 2:
        equation += "->" + spell(args[-1])
    return (equation, *operands)


def _summed_last(term: str, output: str, shape: torch.Size) -> Layout:
    dimensions = len(shape)
    before, dots, after = term.partition("...")
    spread = ["."] * (dimensions - len(before) - len(after)) if dots else []
    labels = [*before, *spread, *after]
    summed = [axis for axis, label in enumerate(labels) if label != "." and label not in output]
    if not summed:
        return LAST
    order = (*(axis for axis in range(dimensions) if axis not in summed), *summed)
    inverse = tuple(order.index(axis) for axis in range(dimensions))
    sizes = [shape[axis] for axis in summed]

    def rows(t: Tensor) -> Tensor:
        return t.permute(order).flatten(-len(summed))

    def back(t: Tensor) -> Tensor:
        parted: Tensor = t.unflatten(-1, sizes)
        return parted.permute(inverse)

    return Layout(f"summed {summed}", rows, back)
