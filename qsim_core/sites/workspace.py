"""Memory that several products use one after another: a quantized operand is not needed after its matmul.

The page faults of fresh memory take about as long as quantizing does. A thread that runs a model keeps the
memory of each use until the forward of the outermost module ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Workspace:
    """Memory on the CPU for one thread and one model, by the name of its use.

    On a GPU torch itself keeps freed memory for the next tensor.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, use: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor. It lies in the same memory as the last one for this use, which is overwritten."""
        size = math.prod(shape)
        kept = self._kept.get((use, dtype))
        if kept is None or len(kept) < size or kept.is_inference() != torch.is_inference_mode_enabled():
            kept = self._kept[use, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return kept[:size].view(*shape)

    def clear(self) -> None:
        """Free all memory."""
        self._kept.clear()


@dataclass(frozen=True)
class Memory:
    """The memory of one use in a workspace. It holds one result at a time."""

    workspace: Workspace
    use: str


def like(memory: Memory | None, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result in the shape and strides of `x`, which has to be dense; fresh memory without a `memory`."""
    if memory is None or x.device.type != "cpu":
        return torch.empty_like(x, dtype=dtype)
    return memory.workspace.empty(memory.use, (x.numel(),), dtype or x.dtype).as_strided(x.shape, x.stride())


def empty(memory: Memory | None, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a contiguous result of this shape; fresh memory without a `memory`."""
    if memory is None or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return memory.workspace.empty(memory.use, shape, dtype)
