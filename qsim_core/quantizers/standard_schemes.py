"""The schemes of the core. They differ in the elements that share a scale.

`scaled(F, block)` is the general scheme. `tensor(F)`, `channel(F)`, `token(F)` and `block(F, n)` are its usual cases.
`at_scale(F, s)` has a scale that is given, and `cast(F)` rounds without a scale. A `channel` is a row of a weight, and
a `token` is a row of an activation. Both have one scale for each row along the matmul's reduction axis, so the scale
factors out of the sum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor

from qsim_core.formats.codes import Encoded
from qsim_core.formats.format import Format
from qsim_core.formats.quantizer import Around, Granularity, Quantizer, laid_out_as
from qsim_core.formats.rounding import working, working_dtype
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme

FLOAT32 = torch.finfo(torch.float32)
ROW_SCALES = ("tensor", "channel", "token")


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _size(value: Any) -> Any:
    tile = isinstance(value, list | tuple) and len(value) == 2 and all(_positive(side) for side in value)
    if _positive(value) or tile:
        return tuple(value) if tile else value
    raise ValueError(f"a block is a whole number from 1 on, or two of them like [128, 128], not {value!r}")


def _block(value: Any) -> Any:
    if value in ROW_SCALES:
        return value
    try:
        return _size(value)
    except ValueError as error:
        raise ValueError(str(error).replace("a block is", "a block is tensor, channel, token,")) from None


class Scaled(Scheme):
    """One scale for each block, of any form."""

    name = "scaled"
    element: Format = Field(description="the number format of the scaled values")
    block: Annotated[Literal["tensor", "channel", "token"] | int | tuple[int, int], BeforeValidator(_block)] = Field(
        "tensor",
        description="elements that share a scale: tensor, channel, token (a row), n along the row, or [rows, columns]",
    )

    @property
    def granularity(self) -> Granularity:
        return self.block


class Tensorwise(Scheme):
    """One scale for the whole tensor."""

    name = "tensor"
    granularity: ClassVar[Granularity] = "tensor"


class Channel(Scheme):
    """One scale for each output channel of a weight."""

    name = "channel"
    granularity: ClassVar[Granularity] = "channel"


class Token(Scheme):
    """One scale for each row (token) of an activation."""

    name = "token"
    granularity: ClassVar[Granularity] = "token"


class Block(Scheme):
    """One scale for each n elements along the reduction axis, or for each tile of [rows, columns]."""

    name = "block"
    element: Format = Field(description="the number format of the scaled values")
    n: Annotated[int | tuple[int, int], BeforeValidator(_size)] = Field(
        description="elements that share a scale: n along the row, or [rows, columns]"
    )

    @property
    def granularity(self) -> Granularity:
        return self.n


class _ByElement(Around, Quantizer):
    """A quantizer that rounds each value by itself, to a number format."""

    element: Format = Field(description="the number format of the values")

    @property
    def inner(self) -> Format:
        return self.element


class AtScale(_ByElement):
    """Round to the values of a format times one scale, which is given: static scales, and the scale of block scales.

    `x` is divided by the scale, rounded as the format rounds, and multiplied by it, in float32. The scale is rounded to
    float32 first. NaN stays NaN.
    """

    name = "at_scale"
    element: Format = Field(description="the number format of the values in units of the scale")
    scale: float = Field(description="the scale, one for all data")

    @field_validator("scale")
    @classmethod
    def _is_normal(cls, scale: float) -> float:
        if not FLOAT32.tiny <= scale <= FLOAT32.max:
            raise ValueError(f"not a normal number of float32, from 1.2e-38 to 3.4e+38: {scale:g}")
        return scale

    def quantize(self, x: Tensor) -> Tensor:
        exact = working(x)
        return laid_out_as(x, (self.element.quantize(exact / self.scale) * self.scale).to(x.dtype))

    def passes(self, x: Tensor) -> Tensor | None:
        return self.element.passes(working(x) / self.scale)

    def encode(self, x: Tensor) -> Encoded:
        return replace(self.element.encode(working(x) / self.scale), dtype=x.dtype)

    def decode(self, encoded: Encoded) -> Tensor:
        units = self.element.decode(replace(encoded, dtype=working_dtype(encoded.dtype)))
        return (units * self.scale).to(encoded.dtype)

    def scales(self, x: Tensor) -> Scales:
        return Scales(torch.full((1, 1), self.scale, dtype=working(x).dtype, device=x.device), None)


class Cast(_ByElement):
    """Round to a format without a scale."""

    name = "cast"

    def quantize(self, x: Tensor) -> Tensor:
        return self.element.quantize(x)

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        return self.element.quantize_into(x, out)

    def passes(self, x: Tensor) -> Tensor | None:
        return self.element.passes(x)

    def encode(self, x: Tensor) -> Encoded:
        return self.element.encode(x)

    def decode(self, encoded: Encoded) -> Tensor:
        return self.element.decode(encoded)

    @property
    def unscaled(self) -> Format:
        return self.element
