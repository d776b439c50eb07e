"""The matmuls of torch: which arguments are operands, and where their reduction axis lies.

A quantizer sees an operand as rows x K with K, the axis that the matmul sums over, last. A `Layout` turns an
operand that way and back. Convolutions reduce over the input channels and the taps of the kernel: weights are
rows of (taps, channels), inputs are laid out with their channels last, and groups are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core.matmuls.call import Call
from qsim_core.matmuls.einsum import _einsum
from qsim_core.matmuls.layout import LAST, SECOND_LAST, Layout, taps


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
