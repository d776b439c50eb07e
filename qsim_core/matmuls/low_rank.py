"""Two factors beside a weight: their product with the input is added to that of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from qsim_core.formats.rounding import working


@dataclass(frozen=True, eq=False)
class LowRank:
    """Adds x (up down)ᵀ to the product of an input x [..., K] and a weight [N, K], before that is rounded.

    The factors `down` [R, K] and `up` [N, R] have a dtype of their own. x, and its product with `down`, are rounded to
    that dtype. Sums are in float32, or in float64 for such an x.
    """

    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        found = working(x)
        for factor in self.factors:
            found = F.linear(found.to(factor.dtype).to(found.dtype), factor.to(found))
        return found.to(x.dtype)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The two matrices that x is multiplied by, in turn."""
        return self.down, self.up

    @property
    def bits(self) -> int:
        """The bits that both factors take."""
        return sum(8 * factor.nbytes for factor in self.factors)

    def __str__(self) -> str:
        return f"two factors of rank {len(self.down)} in {str(self.down.dtype)[6:]}"
