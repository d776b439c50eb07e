"""Operations written with functions of one number: softmax with exp and 1/x, norms with rsqrt.

A device computes them so, and each function may be computed in a way of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qsim_core.formats.rounding import working
from qsim_core.operations.functions import OperationCall

Functions = Mapping[str, Callable[[Tensor], Tensor]]
"""Functions of one number by name, which take the place of torch's."""


def _softmax(x: Tensor, arguments: dict[str, Any], exp: Any, reciprocal: Any) -> Tensor:
    """Compute exp(x - max) times 1 / Σ exp(x - max)."""
    axis = _axis(x, arguments)
    shares = exp(x - x.amax(axis, keepdim=True))
    result: Tensor = shares * reciprocal(shares.sum(axis, keepdim=True))
    return result


def _log_softmax(x: Tensor, arguments: dict[str, Any], exp: Any, log: Any) -> Tensor:
    """Compute x - max - log Σ exp(x - max)."""
    axis = _axis(x, arguments)
    below = x - x.amax(axis, keepdim=True)
    result: Tensor = below - log(exp(below).sum(axis, keepdim=True))
    return result


def _axis(x: Tensor, arguments: dict[str, Any]) -> int:
    """The axis of a softmax; torch has one of its own where none is given."""
    axis: int | None = arguments.get("dim")
    return (0 if x.dim() in (0, 1, 3) else 1) if axis is None else axis


def _layer_norm(x: Tensor, arguments: dict[str, Any], rsqrt: Any) -> Tensor:
    """Compute (x - mean) rsqrt(variance + eps), along the last axes."""
    axes = tuple(range(-len(arguments["normalized_shape"]), 0))
    centred = x - x.mean(axes, keepdim=True)
    return _affine(centred * rsqrt(centred.square().mean(axes, keepdim=True) + arguments.get("eps", 1e-5)), arguments)


def _rms_norm(x: Tensor, arguments: dict[str, Any], rsqrt: Any) -> Tensor:
    """Compute x rsqrt(mean of squares + eps), along the last axes."""
    axes = tuple(range(-len(arguments["normalized_shape"]), 0))
    eps = arguments.get("eps")
    least = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x * rsqrt(x.square().mean(axes, keepdim=True) + least), arguments)


def _group_norm(x: Tensor, arguments: dict[str, Any], rsqrt: Any) -> Tensor:
    """Compute (x - mean) rsqrt(variance + eps) in each group of channels of `[B, C, …]`."""
    groups = x.reshape(len(x), arguments["num_groups"], -1)
    centred = groups - groups.mean(-1, keepdim=True)
    found = centred * rsqrt(centred.square().mean(-1, keepdim=True) + arguments.get("eps", 1e-5))
    of_channels = (-1, *(1,) * (x.dim() - 2))
    shaped = {name: t.view(of_channels) for name in ("weight", "bias") if (t := arguments.get(name)) is not None}
    return _affine(found.reshape(x.shape), shaped)


def _affine(x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    weight, bias = arguments.get("weight"), arguments.get("bias")
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


FORMS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "softmax": (_softmax, ("exp", "reciprocal")),
    "log_softmax": (_log_softmax, ("exp", "log")),
    "layer_norm": (_layer_norm, ("rsqrt",)),
    "rms_norm": (_rms_norm, ("rsqrt",)),
    "group_norm": (_group_norm, ("rsqrt",)),
}
"""The written-out form of a kind, and the functions of one number in it."""


def parts_of(call: OperationCall) -> tuple[str, ...]:
    """Name the functions of one number in the written-out form of an operation; none if it has no such form."""
    return FORMS[call.operation][1] if call.operation in FORMS else ()


def written_out(call: OperationCall, functions: Functions) -> Tensor:
    """Compute an operation by its written-out form, in float32 at least, with some functions of one number replaced."""
    form, parts = FORMS[call.operation]
    x = call.input
    wanted = call.arguments.get("dtype")
    found = form(working(x), call.arguments, *(functions.get(part, getattr(torch, part)) for part in parts))
    return found.to(wanted if isinstance(wanted, torch.dtype) else x.dtype)
