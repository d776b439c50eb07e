"""The torch functions that are operations between products, and the names of their kinds.

Each function has a kind of its own, such as `gelu`, and most have one of a family, such as `activation`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST

NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
ACTIVATIONS = (
    "relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "softplus", "softsign", "hardswish",
    "hardsigmoid", "hardtanh", "sigmoid", "logsigmoid", "tanh",
)  # fmt: skip
OF_ONE_NUMBER = ("exp", "log", "rsqrt", "sqrt", "reciprocal", "erf", "sin", "cos")
"""Functions of one number that other operations are written with."""
FAMILIES = {
    "softmax": ("softmax",),
    "log_softmax": ("log_softmax",),
    "norm": NORMS,
    "activation": ACTIVATIONS,
    "function": OF_ONE_NUMBER,
    "embedding": ("embedding",),
    "add": ("add",),
}
ALONG_AN_AXIS = frozenset({"softmax", "log_softmax", *NORMS})
"""The kinds whose elements depend on each other."""


@dataclass(frozen=True)
class OperationCall(Call):
    """One call of an operation. Its operands are the activations that it reads."""

    kinds: tuple[str, ...] = ()
    """The names of its kind: its own, and that of its family."""

    @property
    def input(self) -> Tensor:
        """The first operand."""
        return self.operands[0]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(_parameters(self.operation), self.args, strict=False)) | self.kwargs

    @property
    def in_place(self) -> bool:
        """True if it writes its result over its first operand."""
        return self.function.__name__.endswith("_") or bool(self.arguments.get("inplace"))

    @property
    def is_pointwise(self) -> bool:
        """True if each element of its result is a function of one number."""
        return len(self.operands) == 1 and not ALONG_AN_AXIS.intersection(self.kinds)

    def of(self, operands: Sequence[Tensor]) -> Tensor:
        """Compute it as torch does, on other operands, which stay as they are."""
        result: Tensor = self.run([x.clone() for x in operands] if self.in_place else operands)
        return result


def read_operation(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> OperationCall | None:
    """Read a call of a torch function as an operation; None if it is not one, or reads no floating-point tensor."""
    kinds = KINDS.get(function)
    if kinds is None or kwargs.get("out") is not None:
        return None
    names = OPERANDS.get(kinds[0], ("input",))
    places = tuple(place if place < len(args) else name for place, name in enumerate(names))
    operands: tuple[Any, ...] = tuple(args[at] if isinstance(at, int) else kwargs.get(at) for at in places)
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in operands):
        return None
    layouts = (LAST,) * len(operands)
    return OperationCall(function, args, kwargs, operands, layouts, places, operation=kinds[0], kinds=kinds)


def _named(kind: str) -> Iterator[Callable[..., Any]]:
    """Give torch's functions and methods of this name, and those that work in place."""
    found = (getattr(home, name, None) for home in (F, torch, Tensor) for name in (kind, f"{kind}_"))
    return (function for function in found if function is not None)


KINDS: dict[Callable[..., Any], tuple[str, ...]] = {
    function: tuple(dict.fromkeys((kind, family)))
    for family, kinds in FAMILIES.items()
    for kind in kinds
    for function in _named(kind)
}
"""The torch functions that are operations, and the names of their kinds."""
OPERANDS = {"add": ("input", "other"), "embedding": ()}
"""The activations that a kind reads, where they are not one `input`."""
IN_ORDER = {"softmax": ("input", "dim", "dtype"), "log_softmax": ("input", "dim", "dtype"), "add": ("input", "other")}
"""The positional arguments of functions that are not written in Python."""


@functools.cache
def _parameters(kind: str) -> tuple[str, ...]:
    """The names of the positional arguments of the functions of a kind."""
    function = getattr(F, kind, None)
    if kind in IN_ORDER or not inspect.isfunction(function):
        return IN_ORDER.get(kind, ("input",))
    return tuple(inspect.signature(function).parameters)
