"""Scales and zero points of the rows of a matrix."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scales(NamedTuple):
    """Scales [A or 1, B or 1] of A rows of B blocks, and zero points in the same shape."""

    scale: Tensor
    zero: Tensor | None

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor | None) -> Scales:
        """Make a matrix of scales that a site holds, [..., B, 1]."""
        blocks = scale.shape[-2]
        scale = scale.detach()
        return cls(scale.reshape(-1, blocks), None if zero is None else zero.expand_as(scale).reshape(-1, blocks))
