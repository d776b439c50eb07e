"""The named schemes of the core: which elements share a scale.

`tensor(F)` `channel(F)` `token(F)` `block(F, n)` are names for filled-in `scaled(…)`; `cast(F)` rounds without
a scale. A `channel` is a row of a weight, a `token` a row of an activation: both give one scale to every row
along the matmul's reduction axis, so that it factors out of the sum.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core.hookspecs import hookimpl
from qsim_core.quantizer import Format, Granularity, Quantizer, Scaled


class Scheme(Quantizer):
    """A quantizer that is a name for a filled-in `Scaled`. One property to write: `scaled`.

    A scheme has an option `element`, so that a bare format can be put into it.
    """

    @property
    @abstractmethod
    def scaled(self) -> Scaled:
        """What this scheme stands for."""

    @functools.cached_property
    def expanded(self) -> Scaled:
        """`scaled`, made once."""
        return self.scaled

    def quantize(self, x: Tensor) -> Tensor:
        return self.expanded.quantize(x)

    def passes(self, x: Tensor) -> Tensor:
        return self.expanded.passes(x)

    def bits_per_element(self, shape: torch.Size) -> float | None:
        return self.expanded.bits_per_element(shape)

    @property
    def granularity(self) -> Granularity:
        return self.expanded.granularity


class Tensorwise(Scheme):
    """One scale for the whole tensor."""

    name = "tensor"
    block: ClassVar[Literal["tensor", "channel", "token"]] = "tensor"
    element: Format = Field(description="the number format of the scaled values")
    scale: Quantizer | None = Field(None, description="what rounds the scale; none keeps it in float32")

    @property
    def scaled(self) -> Scaled:
        return Scaled(element=self.element, block=self.block, scale=self.scale)


class Channel(Tensorwise):
    """One scale for each output channel of a weight."""

    name = "channel"
    block = "channel"


class Token(Tensorwise):
    """One scale for each row (token) of an activation."""

    name = "token"
    block = "token"


class Block(Scheme):
    """One scale for each n elements along the reduction axis."""

    name = "block"
    element: Format = Field(description="the number format of the scaled values")
    n: PositiveInt = Field(description="elements that share a scale")
    scale: Quantizer | None = Field(None, description="what rounds the scales")

    @property
    def scaled(self) -> Scaled:
        return Scaled(element=self.element, block=self.n, scale=self.scale)


class Cast(Quantizer):
    """Round to a format as it is, without any scale."""

    name = "cast"
    element: Format = Field(description="the number format of the values")

    def quantize(self, x: Tensor) -> Tensor:
        return self.element.quantize(x)

    def passes(self, x: Tensor) -> Tensor | None:
        return self.element.passes(x)

    def bits_per_element(self, shape: torch.Size) -> float:
        return self.element.bits_per_element(shape)

    @property
    def granularity(self) -> Granularity:
        return "element"


@hookimpl
def qsim_quantizers() -> list[type[Quantizer]]:
    return [Scaled, Tensorwise, Channel, Token, Block, Cast]
