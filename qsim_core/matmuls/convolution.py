"""How a convolution's call lies over its image: stride, padding on both sides, dilation and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qsim_core.matmuls.call import Call

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Convolution:
    """One number, or pair, for each spatial dimension."""

    taps: tuple[int, ...]
    stride: tuple[int, ...]
    sides: tuple[tuple[int, int], ...]
    """Zeros before and after the image."""
    dilation: tuple[int, ...]
    groups: int
    sizes: tuple[int, ...]
    """Of the image."""

    @classmethod
    def of(cls, call: Call) -> Convolution:
        """That of a call of `CONVOLUTIONS`."""
        image, kernel = call.operands
        space, named = kernel.dim() - 2, arguments(call)
        taps, dilation = tuple(kernel.shape[2:]), _each(named.get("dilation", 1), space)
        spans, padding = [reach * (tap - 1) for reach, tap in zip(dilation, taps, strict=True)], named.get("padding", 0)
        if padding == "same":
            sides = tuple((span // 2, span - span // 2) for span in spans)
        else:
            sides = tuple((pad, pad) for pad in _each(0 if padding == "valid" else padding, space))
        stride, sizes = _each(named.get("stride", 1), space), tuple(image.shape[-space:])
        return cls(taps, stride, sides, dilation, named.get("groups", 1), sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The spatial sizes of the result."""
        each = zip(self.sizes, self.sides, self.taps, self.stride, self.dilation, strict=True)
        return tuple((size + sum(pad) - reach * (tap - 1) - 1) // step + 1 for size, pad, tap, step, reach in each)

    @property
    def tap_inside(self) -> tuple[int, ...] | None:
        """A tap that never meets the zeros beside the image; None where there is none."""
        found = []
        each = zip(self.taps, self.sides, self.dilation, self.stride, self.shape, self.sizes, strict=True)
        for taps, (before, _), reach, step, count, size in each:
            first = [tap * reach - before for tap in range(taps)]  # where a tap stands for the first value
            inside = [tap for tap, place in enumerate(first) if 0 <= place < size - (count - 1) * step]
            if not inside:
                return None
            found.append(inside[0])
        return tuple(found)


def arguments(call: Call) -> dict[str, Any]:
    """What a convolution was called with, by name."""
    return dict(zip(ARGUMENTS, call.args, strict=False)) | call.kwargs


def ran(call: Call, image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The convolution of other operands, without its bias."""
    result: torch.Tensor = call.function(**arguments(call) | {"input": image, "weight": kernel, "bias": None})
    return result


def _each(value: Any, space: int) -> tuple[int, ...]:
    """One number for each spatial dimension."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * space
