"""The effect of quantizing, site by site and role by role, or part by part, as a matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qsim_core import Audit
from qsim_study.blame.parts import PARTS
from qsim_study.cell import SiteCosts

ROLES = ("input", "queries", "keys", "probabilities", "values", "weight", "output")
"""The order of columns; other roles follow."""


@dataclass(frozen=True)
class Quantity:
    """A number that the audit has for each site and role."""

    field: str
    """The field of the audit's measurement; empty for the predicted cost, which is not of the audit."""
    title: str
    factor: float
    unit: str
    digits: str
    """The format of its numbers in d3."""
    higher_is_better: bool


QUANTITIES = (
    Quantity("sqnr_db", "SQNR", 1, "dB", ".1f", True),
    Quantity("clipped", "clipped", 100, "%", ".2~g", False),
    Quantity("flushed", "flushed to zero", 100, "%", ".2~g", False),
)
BLAME = Quantity("", "predicted cost", 1, "in the loss", ".1~g", False)


@dataclass(frozen=True)
class HeatMap:
    """One number for each site (row) and role or part (column); None where it is unknown, or there is no such role."""

    sites: list[str]
    roles: list[str]
    values: list[list[float | None]]

    @property
    def labels(self) -> list[str]:
        """Short names of the sites: from the number of the block on, if they stay different."""
        short = [re.sub(r"^\D*\.(?=\d+\.)", "", site) for site in self.sites]
        return short if len(set(short)) == len(short) else self.sites


def heat_map(audit: Audit, quantity: Quantity) -> HeatMap:
    """The matrix of one quantity over all sites at which something was measured."""
    measured = {one.site: one.measured for one in audit.sites if one.measured}
    measured |= {one.site: one.measured for one in audit.operations if one.measured}
    met = dict.fromkeys(role for roles in measured.values() for role in roles)
    roles = [*(role for role in ROLES if role in met), *(role for role in met if role not in ROLES)]
    values = [[_value(found.get(role), quantity) for role in roles] for found in measured.values()]
    return HeatMap([*measured], roles, values)


def blame_map(costs: SiteCosts) -> HeatMap:
    """The matrix of predicted costs, of all parts together and of each part."""
    parts = [part for part in PARTS if any(part in found for found in costs.costs.values())]
    columns = parts if len(parts) < 2 else ["all", *parts]
    sums = {site: {"all": sum(found.values()), **found} for site, found in costs.costs.items()}
    return HeatMap([*sums], columns, [[found.get(column) for column in columns] for found in sums.values()])


def _value(measured: object | None, quantity: Quantity) -> float | None:
    found: float | None = getattr(measured, quantity.field, None)
    return None if found is None else round(found * quantity.factor, 4)


def ends(maps: list[HeatMap]) -> tuple[float, float] | None:
    """The lowest and the highest value of several maps, so that one colour means one value in all of them."""
    known = [value for one in maps for row in one.values for value in row if value is not None]
    return (min(known), max(known)) if known else None
