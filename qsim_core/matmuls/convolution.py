"""The geometry of a convolution: its taps, stride, padding on both sides, dilation and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qsim_core.matmuls.call import Call

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""The arguments of these functions, in order."""
TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
"""The arguments of the transposed convolutions, in order."""


@dataclass(frozen=True)
class Convolution:
    """The geometry of one convolution: a number, or a pair, for each spatial dimension."""

    taps: tuple[int, ...]
    """The sizes of the kernel."""
    stride: tuple[int, ...]
    sides: tuple[tuple[int, int], ...]
    """The number of zeros before and after the image."""
    dilation: tuple[int, ...]
    groups: int
    sizes: tuple[int, ...]
    """The sizes of the image."""

    @classmethod
    def of(cls, call: Call) -> Convolution:
        """Read the geometry from a call of one of `CONVOLUTIONS`."""
        image, kernel = call.operands
        named = arguments(call)
        space = kernel.dim() - 2
        taps = tuple(kernel.shape[2:])
        dilation = _each(named.get("dilation", 1), space)
        padding = named.get("padding", 0)
        if padding == "same":
            spans = [reach * (tap - 1) for reach, tap in zip(dilation, taps, strict=True)]
            sides = tuple((span // 2, span - span // 2) for span in spans)
        else:
            sides = tuple((pad, pad) for pad in _each(0 if padding == "valid" else padding, space))
        stride = _each(named.get("stride", 1), space)
        sizes = tuple(image.shape[-space:])
        return cls(taps, stride, sides, dilation, named.get("groups", 1), sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The spatial sizes of the result."""
        dimensions = zip(self.sizes, self.sides, self.taps, self.stride, self.dilation, strict=True)
        return tuple(
            (size + sum(pad) - reach * (tap - 1) - 1) // step + 1 for size, pad, tap, step, reach in dimensions
        )


def arguments(call: Call) -> dict[str, Any]:
    """The arguments of a convolution's call by name."""
    return dict(zip(ARGUMENTS, call.args, strict=False)) | call.kwargs


def ran(call: Call, image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Compute the convolution of another image and kernel with the arguments of a call, without its bias."""
    result: torch.Tensor = call.function(**arguments(call) | {"input": image, "weight": kernel, "bias": None})
    return result


def _each(value: Any, space: int) -> tuple[int, ...]:
    """One number for each spatial dimension."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * space
