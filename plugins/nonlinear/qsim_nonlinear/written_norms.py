"""RMS norms that a module writes out in Python, as in Llama: pow, mean, rsqrt, mul. What they compute is tried once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsim_core import OperationCall
from qsim_core.operations.functions import read_operation

EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""The names that modules have for the number that is added to the mean of squares."""
CLOSE = 0.02
"""The share of the largest number by which a norm in bfloat16 may differ."""
Scale = Callable[[nn.Module, Tensor], Tensor | None]


def _none(module: nn.Module, x: Tensor) -> None:
    return None


def _weight(module: nn.Module, x: Tensor) -> Tensor:
    return next(module.parameters()).to(x.dtype)


def _one_more(module: nn.Module, x: Tensor) -> Tensor:
    """The scale of a norm whose parameter is the difference to 1, as in Gemma."""
    return (next(module.parameters()).float() + 1).to(x.dtype)


class WrittenNorms:
    """The modules of a model that are RMS norms, each tried at its first call."""

    def __init__(self) -> None:
        self._scales: weakref.WeakKeyDictionary[nn.Module, Scale | None] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._scales = weakref.WeakKeyDictionary()

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> OperationCall | None:
        """Read the call of a module as the RMS norm that it computes; None if it is another module."""
        if len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].is_floating_point() or not args[0].dim():
            return None
        (x,) = args
        if module not in self._scales:
            self._scales[module] = _scale_of(module, x)
        scale = self._scales[module]
        return None if scale is None else _call(x, scale(module, x), _epsilon(module))


def _call(x: Tensor, scale: Tensor | None, epsilon: float | None) -> OperationCall | None:
    return read_operation(F.rms_norm, (x, x.shape[-1:], scale, epsilon), {})


def _epsilon(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in EPSILONS)
    return next((value for value in found if isinstance(value, float)), None)


@torch.no_grad()
def _scale_of(module: nn.Module, x: Tensor) -> Scale | None:
    """The scale with which a module normalizes a row of numbers; None if it does something else."""
    parameters = list(module.parameters())
    rows = len(parameters) < 2 and all(parameter.shape == x.shape[-1:] for parameter in parameters)
    if _epsilon(module) is None or not rows or any(module.children()) or type(module).__module__.startswith("torch."):
        return None
    scales: tuple[Scale, ...] = (_weight, _one_more) if parameters else (_none,)
    if x.is_meta:  # there are no numbers to try
        return scales[0] if "norm" in type(module).__name__.lower() else None
    with torch._C.DisableTorchFunction():
        row = torch.linspace(-2, 3, x.shape[-1], dtype=x.dtype, device=x.device).unsqueeze(0)
        try:
            found = module.forward(row)
        except Exception:  # of a module that takes something else
            return None
        if not isinstance(found, Tensor) or found.shape != row.shape:
            return None
        errors = {scale: _difference(found, F.rms_norm(row, row.shape[-1:], scale(module, row))) for scale in scales}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < CLOSE else None


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest number; Inf if that is 0."""
    largest = expected.float().abs().max()
    return float((found.float() - expected.float()).abs().max() / largest) if largest else float("inf")
