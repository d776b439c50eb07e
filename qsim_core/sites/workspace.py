"""Memory that products use again: what is quantized for a matmul is of no use after it.

Fresh memory comes with page faults, which take about as long as quantizing does. What runs a model keeps what it had,
under the name of its use, until the outermost module's forward ends.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class _Wanted(threading.local):
    """Whose memory the next result of this thread shall be in, and for which use."""

    by: tuple[Scratch, str] | None = None


_wanted = _Wanted()


class Scratch:
    """Memory on the CPU by the name of its use; for one thread, and one model. On a GPU torch keeps what is freed."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, use: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor; what was there for this use is overwritten."""
        size, kept = math.prod(shape), self._kept.get((use, dtype))
        if kept is None or len(kept) < size or kept.is_inference() != torch.is_inference_mode_enabled():
            kept = self._kept[use, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return kept[:size].view(*shape)

    @contextlib.contextmanager
    def wanted(self, use: str) -> Iterator[None]:
        """Inside, the first result that this module is asked for is here."""
        _wanted.by = self, use
        try:
            yield
        finally:
            _wanted.by = None

    def clear(self) -> None:
        self._kept.clear()


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result in the shape and the strides of `x`, whose values lie dense; fresh, unless some is wanted."""
    by, _wanted.by = _wanted.by, None
    if by is None or x.device.type != "cpu":
        return torch.empty_like(x, dtype=dtype)
    scratch, use = by
    return scratch.empty(use, (x.numel(),), dtype or x.dtype).as_strided(x.shape, x.stride())


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for a contiguous result."""
    by, _wanted.by = _wanted.by, None
    if by is None or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    scratch, use = by
    return scratch.empty(use, shape, dtype)
