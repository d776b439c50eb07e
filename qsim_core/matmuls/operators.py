"""The matmuls of torch: a table of functions, their operands, and the layouts of the operands.

The operands of a convolution are its image and its kernel. It sums over the input channels and the taps of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qsim_core.matmuls.call import Call
from qsim_core.matmuls.convolution import ARGUMENTS, TRANSPOSED_ARGUMENTS
from qsim_core.matmuls.einsum import einsum_call
from qsim_core.matmuls.layout import LAST, SECOND_LAST, Layout, along, channels, positions, taps

LayoutsOf = Callable[[dict[str, Any]], tuple[Layout, Layout]]
"""A function of a call's arguments by name that gives the layouts of the two operands."""


@dataclass(frozen=True)
class Op:
    """The signature of one torch function: the names of its parameters in order, its operands, and their layouts."""

    parameters: tuple[str, ...]
    operands: tuple[str, str]
    layouts: LayoutsOf
    addend: str | None = None
    """The parameter that is added to the product."""
    space: int = 0
    """The number of spatial dimensions of a convolution, whose channels stand before them; 0 for any other function."""

    def read(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Read a call of this function, with positional arguments, keyword arguments, or both."""
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        return Call(
            function,
            args,
            kwargs,
            operands=tuple(named[name] for name in self.operands),
            layouts=self.layouts(named),
            places=tuple(self._place(name, len(args)) for name in self.operands),
            addend=named.get(self.addend) if self.addend else None,
            result=channels(self.space) if self.space else LAST,
            operation=function.__name__.strip("_"),
        )

    def _place(self, name: str, positional: int) -> int | str:
        """The index of a positional argument, or the name of a keyword argument."""
        index = self.parameters.index(name)
        return index if index < positional else name


def _always(left: Layout, right: Layout) -> LayoutsOf:
    return lambda named: (left, right)


def _convolution(space: int, transposed: bool = False) -> Op:
    def layouts(named: dict[str, Any]) -> tuple[Layout, Layout]:
        groups = named.get("groups", 1)
        image = channels(space) if groups == 1 else positions(named["input"], space, groups)
        return image, taps(named["weight"], outputs=int(transposed), groups=groups)

    parameters = TRANSPOSED_ARGUMENTS if transposed else ARGUMENTS
    return Op(parameters, ("input", "weight"), layouts, space=space)


_LINEAR = Op(("input", "weight", "bias"), ("input", "weight"), _always(LAST, LAST))
_MATMUL = Op(("input", "other"), ("input", "other"), _always(LAST, SECOND_LAST))
_RMATMUL = Op(("other", "input"), ("input", "other"), _always(LAST, SECOND_LAST))
_VECDOT = Op(("x", "y"), ("x", "y"), lambda named: (along(named.get("dim", -1)),) * 2)
_GROUPED = Op(("mat_a", "mat_b", "offs"), ("mat_a", "mat_b"), _always(LAST, SECOND_LAST))

OF_MATRICES = {
    "matmul": _MATMUL,
    "mm": Op(("input", "mat2"), ("input", "mat2"), _always(LAST, SECOND_LAST)),
    "bmm": Op(("input", "mat2"), ("input", "mat2"), _always(LAST, SECOND_LAST)),
    "mv": Op(("input", "vec"), ("input", "vec"), _always(LAST, LAST)),
    "inner": Op(("input", "other"), ("input", "other"), _always(LAST, LAST)),
    "dot": Op(("input", "other"), ("input", "other"), _always(LAST, LAST)),
    "vdot": Op(("input", "other"), ("input", "other"), _always(LAST, LAST)),
    "addmv": Op(("input", "mat", "vec"), ("mat", "vec"), _always(LAST, LAST), addend="input"),
    "addmm": Op(("input", "mat1", "mat2"), ("mat1", "mat2"), _always(LAST, SECOND_LAST), addend="input"),
    "baddbmm": Op(("input", "batch1", "batch2"), ("batch1", "batch2"), _always(LAST, SECOND_LAST), addend="input"),
}
"""The signatures of functions that are methods of tensors too, by name."""
GROUPED = [getattr(home, name) for home, name in ((torch, "_grouped_mm"), (F, "grouped_mm")) if hasattr(home, name)]
"""The functions for products of groups of rows with one matrix each; not every version of torch has them."""

OPS: dict[Callable[..., Any], Op] = {
    F.linear: _LINEAR,
    torch.Tensor.__matmul__: _MATMUL,
    torch.Tensor.__rmatmul__: _RMATMUL,
    torch.linalg.matmul: _MATMUL,
    torch.linalg.vecdot: _VECDOT,
    **dict.fromkeys(GROUPED, _GROUPED),
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.conv_transpose1d: _convolution(1, transposed=True),
    F.conv_transpose2d: _convolution(2, transposed=True),
    F.conv_transpose3d: _convolution(3, transposed=True),
    **{getattr(home, name): op for name, op in OF_MATRICES.items() for home in (torch, torch.Tensor)},
}
"""The signature of each torch function that is a matmul, except `torch.einsum`."""


def read_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Read a call of a torch function as a matmul; None if it is not a matmul."""
    if function is torch.einsum:
        return einsum_call(args)
    op = OPS.get(function)
    return op.read(function, args, kwargs) if op else None
