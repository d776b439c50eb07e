"""Quantized tensors as they would be stored: codes, scales, zero points, and how many bits they take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsim_core.errors import QsimError


@dataclass(frozen=True)
class Encoded:
    """What `Quantizer.encode` makes of a tensor, and `Quantizer.decode` turns back into the quantized tensor.

    `codes` are whole numbers from 0 on, in the shape of the tensor: uint8 up to 8 bits, int32 beyond. `scales` are a
    tensor, or codes again where the scale is itself quantized; `zero_points` are codes of the element format.
    """

    codes: Tensor
    width: int
    """Bits of one code."""
    dtype: torch.dtype
    """Of the tensor that was encoded, and of what `decode` gives."""
    scales: Tensor | Encoded | None = None
    zero_points: Tensor | None = None

    def packed(self) -> Tensor:
        """The codes alone as bytes, `width` bits each, the first code in the lowest bits of the first byte."""
        return pack(self.codes, self.width)

    @property
    def bits(self) -> int:
        """Bits stored in all: codes, zero points, and scales; 32 for a scale that nothing rounds, as in float32."""
        own = self.width * (self.codes.numel() + (0 if self.zero_points is None else self.zero_points.numel()))
        if isinstance(self.scales, Encoded):
            return own + self.scales.bits
        return own + (0 if self.scales is None else self.scales.numel() * 32)


def as_codes(codes: Tensor, width: int) -> Tensor:
    """Codes in the integer dtype that `Encoded` promises."""
    return codes.to(torch.uint8 if width <= 8 else torch.int32)


def pack(codes: Tensor, width: int) -> Tensor:
    """Codes as a little-endian stream of bits: uint8 [ceil(n * width / 8)], code i in bits i * width and on."""
    bits = codes.flatten().long().unsqueeze(-1) >> torch.arange(width, device=codes.device) & 1
    stream = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, width: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The codes that `pack` packed, in their shape. Raises `QsimError` if the bytes are not that many."""
    count = torch.Size(shape).numel()
    if packed.numel() != (count * width + 7) // 8:
        raise QsimError(f"{count} codes of {width} bits fill {(count * width + 7) // 8} bytes, not {packed.numel()}")
    stream = packed.long().unsqueeze(-1) >> torch.arange(8, device=packed.device) & 1
    bits = stream.flatten()[: count * width].view(-1, width)
    return as_codes((bits << torch.arange(width, device=packed.device)).sum(-1), width).view(shape)
