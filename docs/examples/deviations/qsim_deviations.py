"""Clipping at a number of standard deviations: `tensor(int8, range=deviations(3))`."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

import qsim_core as qsim
from qsim_core.quantizers.calibrators import ErrorOf


class Deviations(qsim.Calibrator):
    """`k` root mean squares to either side, and no further than the extremes."""

    name = "deviations"
    k: float = Field(4.0, gt=0, description="root mean squares to cover")

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        counts = torch.ones_like(blocks) if counts is None else counts.to(blocks)
        square = (blocks.square() * counts).sum(-1) / counts.sum(-1).clamp(min=1)
        reach = self.k * square.sqrt()
        return torch.maximum(-reach, blocks.amin(-1)), torch.minimum(reach, blocks.amax(-1))


@qsim.hookimpl
def qsim_calibrators() -> list[type[qsim.Calibrator]]:
    return [Deviations]
