"""The operands of `torch.einsum`."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import QsimError
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST, Layout


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
