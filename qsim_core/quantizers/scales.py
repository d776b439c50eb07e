"""Scales and zero points of the rows of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    pass


class Scales(NamedTuple):
    """Scales [A or 1, B or 1], and zero points like them."""

    scale: Tensor
    zero: Tensor | None

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor | None) -> Scales:
        """Scales that a site holds, [..., B, 1], as a matrix."""
        blocks = scale.shape[-2]
        scale = scale.detach()
        return cls(scale.reshape(-1, blocks), None if zero is None else zero.expand_as(scale).reshape(-1, blocks))
