"""Scales and zero points of the rows of a matrix."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeGuard

from torch import Tensor


class Scales(NamedTuple):
    """Scales and zero points of A rows with B blocks each, in the shape [A or 1, B or 1]."""

    scale: Tensor
    zero: Tensor | None
    """The zero points; None for symmetric scales."""

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor | None) -> Scales:
        """Make the matrices from scales and zero points [..., B, 1] that a site holds."""
        blocks = scale.shape[-2]
        scale = scale.detach()
        if zero is not None:
            zero = zero.expand_as(scale).reshape(-1, blocks)
        return cls(scale.reshape(-1, blocks), zero)

    def by_rows(self) -> Scales:
        """Bring scales and zero points [..., B] into the shape of matrices."""
        zero = None if self.zero is None else self.zero.reshape(-1, self.zero.shape[-1])
        return Scales(self.scale.reshape(-1, self.scale.shape[-1]), zero)


class HasScales(Protocol):
    """A quantizer of scales that has scales itself: they are found in the whole range of each block, and are held."""

    def scale_map(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give the scale and the zero point of each element of `x`, in its shape."""

    def round_at(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Round `x` under given scales and zero points, which have its shape."""


def has_scales(quantizer: object) -> TypeGuard[HasScales]:
    """Tell if a quantizer has scales itself. `isinstance` of a protocol takes long, and this is asked at each call."""
    return hasattr(type(quantizer), "scale_map") and hasattr(type(quantizer), "round_at")
