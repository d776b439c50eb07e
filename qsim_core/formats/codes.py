"""Quantized tensors as they would be stored: codes, scales, zero points, and the bits that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import QsimError


@dataclass(frozen=True)
class Encoded:
    """The stored form of a tensor: `Quantizer.encode` makes it, and `Quantizer.decode` gives the quantized tensor back.

    `codes` are whole numbers from 0 on, in the shape of the tensor: uint8 up to 8 bits, int32 beyond. `scales` are a
    tensor, or an `Encoded` again if the scale is itself quantized. `zero_points` are codes of the element format.
    """

    codes: Tensor
    width: int
    """The number of bits of one code."""
    dtype: torch.dtype
    """The dtype of the tensor that was encoded, and of the tensor that `decode` gives."""
    scales: Tensor | Encoded | None = None
    zero_points: Tensor | None = None

    def packed(self) -> Tensor:
        """Pack the codes alone, `width` bits each, into bytes: the first code is in the first byte's lowest bits."""
        return pack(self.codes, self.width)

    @property
    def tensors(self) -> dict[str, Any]:
        """The codes, the scales and all else that has parts in a stack, by field."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in held.items() if isinstance(part, Tensor | Encoded)}

    @classmethod
    def stack(cls, parts: Sequence[Encoded]) -> Encoded:
        """Stack tensors of one shape that a quantizer has encoded one by one."""
        return replace(parts[0], **{name: _stack([getattr(part, name) for part in parts]) for name in parts[0].tensors})

    def __getitem__(self, place: int) -> Encoded:
        """One of the stacked tensors."""
        return replace(self, **{name: part[place] for name, part in self.tensors.items()})

    @property
    def bits(self) -> int:
        """The number of bits of the codes, the zero points and the scales; a scale that is not rounded has 32 bits."""
        count = self.codes.numel()
        if self.zero_points is not None:
            count += self.zero_points.numel()
        bits = self.width * count
        if isinstance(self.scales, Encoded):
            return bits + self.scales.bits
        if self.scales is not None:
            return bits + 32 * self.scales.numel()
        return bits


def _stack(parts: list[Any]) -> Any:
    if isinstance(parts[0], Encoded):
        return Encoded.stack(parts)
    return torch.stack(parts)


def as_codes(codes: Tensor, width: int) -> Tensor:
    """Convert codes to the integer dtype of `Encoded`: uint8 up to 8 bits, int32 beyond."""
    return codes.to(torch.uint8 if width <= 8 else torch.int32)


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack n codes into a little-endian stream of bits: uint8 [ceil(n * width / 8)], code i from bit i * width on."""
    bits = codes.flatten().long().unsqueeze(-1) >> torch.arange(width, device=codes.device) & 1
    stream = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, width: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Unpack the codes that `pack` packed, and give them their shape.

    Raises `QsimError` if the number of bytes does not fit the shape.
    """
    count = torch.Size(shape).numel()
    if packed.numel() != (count * width + 7) // 8:
        raise QsimError(f"{count} codes of {width} bits fill {(count * width + 7) // 8} bytes, not {packed.numel()}")
    stream = packed.long().unsqueeze(-1) >> torch.arange(8, device=packed.device) & 1
    bits = stream.flatten()[: count * width].view(-1, width)
    return as_codes((bits << torch.arange(width, device=packed.device)).sum(-1), width).view(shape)
