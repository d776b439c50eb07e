"""Hardware for qsim: `qsim evaluate --precision w8a8 --on multipliers`."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

import qsim_core as qsim


class Multipliers(qsim.Hardware):
    """Multipliers that compute products at one rate, whatever the width of the operands."""

    name = "multipliers"
    rate: float = Field(1e12, gt=0, description="multiplications a second")

    def cost(self, work: Sequence[qsim.SiteWork]) -> qsim.Cost:
        seconds = sum(one.product.multiplications for one in work) / self.rate
        return qsim.Cost(totals={"seconds": seconds}, assumptions=["operands are always there in time"])


@qsim.hookimpl
def qsim_hardware() -> list[type[qsim.Hardware]]:
    return [Multipliers]
