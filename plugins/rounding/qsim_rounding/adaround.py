"""AdaRound: a soft choice between the two neighbours of each element, which a penalty makes hard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from qsim_rounding.cells import Grid
from qsim_rounding.learning import Choice, LearnedRounding, flat

STRETCH = (-0.1, 1.1)
"""The sigmoid is stretched over this range and clipped to 0 … 1, so that it reaches both."""
WARM_UP = 0.2
"""The share of the steps before the penalty begins."""
SHARPNESS = (20.0, 2.0)
"""The exponent of the penalty, from its beginning to the last step."""


class SoftChoice(Choice):
    """h(V) [..., B, n] between 0 and 1 is the share of the distance to the upper neighbour."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.scale, self.zero = grid.scales()
        self.cells = grid.cells(grid.units(self.scale, self.zero))
        low, high = STRETCH
        self.raw = torch.logit((self.cells.share - low) / (high - low)).requires_grad_()

    @property
    def learned(self) -> list[Tensor]:
        return [self.raw]

    @property
    def share(self) -> Tensor:
        """h(V)."""
        low, high = STRETCH
        return (torch.sigmoid(self.raw) * (high - low) + low).clamp(0, 1)

    def soft(self) -> Tensor:
        return self.grid.join(self.cells.low + self.cells.step * self.share, self.scale, self.zero)

    def hard(self) -> tuple[Tensor, Tensor, Tensor | None]:
        up = (self.share.detach() >= 0.5).to(self.raw.dtype)
        return self.grid.join(self.cells.low + self.cells.step * up, self.scale, self.zero), self.scale, self.zero


class AdaRound(LearnedRounding):
    """Learns by Adam how far each element goes from its lower to its upper neighbour; it ends at one of them.

    The loss is the block's squared error plus `penalty` times the sum of 1 - |2h - 1|^b, where b falls from 20 to 2.
    Scales stay as they are. Source: AdaRound (arXiv 2004.10568), by block as in BRECQ (2102.05426). The README lists
    every difference.
    """

    name = "adaround"
    steps: int = Field(1000, gt=0, description="steps for each block")
    rate: float = Field(0.01, gt=0, allow_inf_nan=False, description="Adam's learning rate")
    penalty: float = Field(0.01, ge=0, allow_inf_nan=False, description="weight of the penalty, per element")

    def choice(self, grid: Grid) -> SoftChoice:
        return SoftChoice(grid)

    def learn(self, choices: Sequence[Choice], gradients: Iterator[tuple[float, list[Tensor]]]) -> None:
        optimizer = torch.optim.Adam(flat(choices), lr=self.rate)
        for step, (_, by_rows) in enumerate(gradients):
            progress = (step / self.steps - WARM_UP) / (1 - WARM_UP)
            for choice, gradient in zip(choices, by_rows, strict=True):
                assert isinstance(choice, SoftChoice)
                loss = (choice.soft() * gradient.to(choice.raw.dtype)).sum()
                if progress >= 0:
                    sharpness = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * (1 - progress)
                    loss = loss + self.penalty * (1 - (2 * choice.share - 1).abs().pow(sharpness)).sum()
                (choice.raw.grad,) = torch.autograd.grad(loss, [choice.raw])
            optimizer.step()
