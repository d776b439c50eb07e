"""Sums of two activations: a part of a rotary embedding, a residual addition, or neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qsim_core import OperationCall
from qsim_core.matmuls.layout import LAST
from qsim_core.sites.call_stack import Frame
from qsim_nonlinear.module_state import Running

PRODUCTS = frozenset({torch.mul, Tensor.mul})
"""The functions that multiply elements, of which a rotary embedding is made."""
DIFFERENCES = frozenset({torch.sub, torch.subtract, Tensor.sub, Tensor.subtract})
"""The functions that subtract, as the first half of a split rotary embedding does."""
JOINS = frozenset({torch.cat, torch.concat, torch.concatenate})
"""The functions that put the halves of a split rotary embedding together."""
ROTARY = ("rotary",)
"""The kind of rotary embeddings, for which torch has no function."""


def read_sum(frame: Frame, call: OperationCall) -> OperationCall | None:
    """Read a sum of two activations: as part of a rotary embedding, as a residual addition, or as neither.

    A residual addition has operands with rows of one length, in a module that has others inside. It does not add a mask
    to scores, and neither operand was just multiplied by another activation.
    """
    left, right = call.operands
    first, second = (Running.of(frame).factors(x) for x in (left, right))
    plain = call.function.__name__ == "add" and "alpha" not in call.kwargs
    if first is not None and second is not None and plain:
        (x, cosine), (turned, sine) = first, second
        halves = x._base is not None and x._base is turned._base  # of a rotation whose other half is a difference
        if not halves and _is_rotation(cosine, sine):
            return _rotary(_rotated, (x, cosine, turned, sine))
    if first is not None or second is not None or any(not x.is_meta and bool(hidden(x).any()) for x in call.operands):
        return None  # a recurrence, or a mask
    rows = left.dim() > 1 < right.dim() and left.shape[-1] == right.shape[-1] > 1
    scores = [shape[-2:] for site, shape in frame.before_softmax if not site.is_value_product]
    masks = any(x.shape[-2:] in scores for x in call.operands)
    return call if rows and not masks and any(frame.module.children()) else None


def read_join(frame: Frame, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OperationCall | None:
    """Read the call that joins x cos - y sin and y cos + x sin, the halves of a rotary embedding; None: it does not."""
    tensors = args[0] if args and isinstance(args[0], tuple | list) else ()
    halves = Running.of(frame).halves
    if len(tensors) != 2 or len(halves) != 2:
        return None
    difference, total = (halves[kind].factors_of(x) for kind, x in zip(("sub", "add"), tensors, strict=True))
    if difference is None or total is None:
        return None
    x, cosine, y, sine = difference
    same = all(a is b for a, b in zip(total, (y, cosine, x, sine), strict=True))
    if not same or not _is_rotation(cosine, sine):
        return None

    def joined(x: Tensor, cosine: Tensor, y: Tensor, sine: Tensor) -> Tensor:
        result: Tensor = function((x * cosine - y * sine, y * cosine + x * sine), *args[1:], **kwargs)
        return result

    return _rotary(joined, (x, cosine, y, sine))


def hidden(x: Tensor) -> Tensor:
    """Tell which scores, or terms of a mask, hide a position: -Inf, or half the lowest number and below."""
    return x <= torch.finfo(x.dtype).min / 2


def _rotated(x: Tensor, cosine: Tensor, turned: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs of channels: x cos + turned sin, where `turned` holds the other channel of each pair, signed."""
    return x * cosine + turned * sine


def _rotary(function: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> OperationCall:
    layouts, places = (LAST,) * len(operands), tuple(range(len(operands)))
    return OperationCall(function, operands, {}, operands, layouts, places, operation="rotary", kinds=ROTARY)


def _is_rotation(cosine: Tensor, sine: Tensor) -> bool:
    """Tell if two factors are the cosines and sines of angles, up to one common factor.

    Without values each pair of one shape counts as such.
    """
    if cosine.shape != sine.shape or cosine.is_meta:
        return cosine.shape == sine.shape
    radius = cosine.detach().float().square() + sine.detach().float().square()
    most = radius.max()
    return bool(most > 0) and bool((radius.min() - most).abs() <= most / 32)
