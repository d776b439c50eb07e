"""`torch.einsum` read as a matmul: its operands, each with its summed axes last."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import QsimError
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST, Layout

DOTS = "".join(map(chr, range(0xE000, 0xE040)))
"""Letters for the axes of an ellipsis, which no equation uses."""


def einsum_call(args: tuple[Any, ...]) -> Call | None:
    """Read a call such as `einsum("bqd,bkd->bqk", q, k)`; None if it sums over no label that two operands have.

    Such an einsum multiplies elements, as `"i,j->ij"` does, and is not a matmul. The reduction axis of an operand is
    the flattened axes of its summed labels, in the operand's order. Raises `QsimError` if the equation has more or
    fewer terms than there are operands.
    """
    if not isinstance(args[0], str):
        args = _with_equation(args)
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    tensors = tuple(operands)
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(tensors):
        raise QsimError(f"einsum {equation!r} names {len(terms)} operands and is given {len(tensors)}")
    if not arrow:
        output = _implied_output(inputs)
    shared = {label for label in set(inputs) - {","} if sum(label in term for term in terms) > 1}
    if shared <= set(output):
        return None
    output = output.replace("...", DOTS)
    labels = tuple(_spread(term, tensor.dim()) for term, tensor in zip(terms, tensors, strict=True))
    layouts = tuple(_summed_last(own, output, tensor.shape) for own, tensor in zip(labels, tensors, strict=True))
    function = lambda *new: torch.einsum(equation, *new)  # noqa: E731
    places = tuple(range(len(tensors)))
    return Call(function, tensors, {}, tensors, layouts, places, labels=(*labels, output))


def _with_equation(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rewrite `einsum(x, [0, 1], y, [1, 2], [0, 2])` as `einsum("ab,bc->ac", x, y)`."""
    operands = args[: len(args) // 2 * 2 : 2]
    sublists = args[1::2]

    def labels(sublist: Sequence[Any]) -> str:
        return "".join("..." if label is Ellipsis else string.ascii_letters[label] for label in sublist)

    equation = ",".join(labels(sublist) for sublist in sublists)
    if len(args) % 2:
        equation += "->" + labels(args[-1])
    return (equation, *operands)


def _implied_output(inputs: str) -> str:
    """The output of an equation without `->`: the labels that occur once, in the order of the alphabet."""
    labels = [label for label in inputs if label.isalpha()]
    return "..." + "".join(sorted(label for label in set(labels) if labels.count(label) == 1))


def _spread(term: str, dimensions: int) -> str:
    """Give each axis of an operand a letter: those of an ellipsis get the last of `DOTS`, the same in all operands."""
    before, dots, after = term.partition("...")
    unnamed = dimensions - len(before) - len(after)
    return before + (DOTS[len(DOTS) - unnamed :] if dots else "") + after


def _summed_last(labels: str, output: str, shape: torch.Size) -> Layout:
    """The layout of an operand: the axes whose labels are not in the output are last, flattened to one."""
    summed = [axis for axis, label in enumerate(labels) if label not in output]
    if not summed:
        return LAST
    order = (*(axis for axis in range(len(shape)) if axis not in summed), *summed)
    inverse = tuple(order.index(axis) for axis in range(len(shape)))
    sizes = [shape[axis] for axis in summed]

    def rows(t: Tensor) -> Tensor:
        return t.permute(order).flatten(-len(summed))

    def back(t: Tensor) -> Tensor:
        unflattened: Tensor = t.unflatten(-1, sizes)
        return unflattened.permute(inverse)

    return Layout(f"summed {summed}", rows, back)
