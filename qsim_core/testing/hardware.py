"""The suite of hook `qsim_hardware`: what products cost."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
from torch import nn

from qsim_core.components.component import Component
from qsim_core.simulation.simulation import simulate
from qsim_core.simulation.work import Cost, Hardware, SiteWork
from qsim_core.testing.component import ComponentSuite, noise
from qsim_core.testing.model import scaled

ADDED_UP = ("seconds", "joules")
"""The quantities that are added up over forwards."""


def work(rows: int = 4, quantized: bool = True) -> list[SiteWork]:
    """The work of two layers, for so many rows."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    recipe = {"weights": scaled(8, "channel"), "activations": scaled(8, "token")} if quantized else {}
    return simulate(model, recipe, example=noise(rows, 64)).work()


class HardwareSuite(ComponentSuite):
    """`cost(work)` gives finite totals, their shares by site, and the conditions under which they hold."""

    base: ClassVar[type[Component]] = Hardware

    def totals(self, component: Any, done: list[SiteWork]) -> dict[str, float]:
        """The totals of some work."""
        totals: dict[str, float] = component.cost(done).totals
        return totals

    @pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "float32"])
    def test_the_cost_of_two_layers_is_finite(self, component: Any, quantized: bool) -> None:
        cost = component.cost(work(quantized=quantized))

        assert isinstance(cost, Cost), f"{component} gives {type(cost).__name__}; return a qsim_core.Cost"
        wrong = {name: number for name, number in cost.totals.items() if not 0 <= number < math.inf}
        assert not wrong, f"{component} gives {wrong}; a cost is a finite number from 0"

    def test_sites_are_those_of_the_work(self, component: Any) -> None:
        strangers = component.cost(work()).sites.keys() - {"0", "1"}

        assert not strangers, f"{component} names sites {sorted(strangers)} that are not in the work"

    def test_it_says_under_which_conditions(self, component: Any) -> None:
        assert component.cost(work()).assumptions, f"{component} states no assumptions beside its numbers"

    def test_the_same_work_costs_the_same(self, component: Any) -> None:
        assert component.cost(work()) == component.cost(work()), f"{component} gives another cost for the same work"

    def test_more_rows_do_not_cost_less(self, component: Any) -> None:
        few, many = self.totals(component, work(4)), self.totals(component, work(400))

        less = [name for name in ADDED_UP if name in few and many[name] < few[name]]
        assert not less, f"{component}: {less} of 400 rows are fewer than of 4"

    def test_no_work_takes_no_time_and_no_energy(self, component: Any) -> None:
        totals = self.totals(component, [])

        assert not any(totals.get(name) for name in ADDED_UP), f"{component} prices no work at {totals}"
