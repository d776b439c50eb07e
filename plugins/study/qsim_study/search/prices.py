"""The price of an allotment: bits, bytes, bit operations, milliseconds.

Each quantity is a function of the work of a forward, and is added up over the sites. The work under every choice is
counted once, and put together for any allotment. Hardware prices a whole forward, and its time is taken site by site.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import nn

from qsim_core import Hardware, QsimError, Recipe, RecipeError, Simulation, SiteWork, simulate
from qsim_study.search.choices import Allotment, Choice, Group, Offered, combinations
from qsim_study.search.found import Budget


@dataclass(frozen=True)
class SiteTime:
    """The seconds that hardware takes for a site in a forward."""

    site: str
    hardware: Hardware
    seconds: float


Part = SiteWork | SiteTime


class Works:
    """The work of one forward at each site under each choice, and the time that it takes on hardware."""

    def __init__(
        self,
        model: nn.Module,
        base: Recipe,
        offered: Offered,
        groups: Sequence[Group],
        example: Any,
        on: Sequence[Hardware] = (),
    ) -> None:
        self.groups = groups
        self._under: list[tuple[Choice, dict[str, list[Part]]]] = []
        for choice in combinations(offered):
            with simulate(model, base.model_copy(update={**choice, "transforms": ()}), example=example) as simulation:
                by_site: dict[str, list[Part]] = defaultdict(list)
                parts: list[Part] = [*simulation.work(), *(time for one in on for time in _times(one, simulation))]
                for part in parts:
                    by_site[part.site].append(part)
                self._under.append((choice, by_site))
        allotted = {site for group in groups for site in group.sites}
        self.fixed = [one for name, works in self._under[0][1].items() if name not in allotted for one in works]
        """The work at the sites that are in no group."""

    def of(self, group: Group, choice: Choice) -> list[Part]:
        """The work at a group's sites under a choice."""
        works = next(works for under, works in self._under if all(under[key] == one for key, one in choice.items()))
        return [one for site in group.sites for one in works[site]]

    def under(self, allotted: Allotment) -> list[Part]:
        """All work of a forward under an allotment."""
        return [*self.fixed, *(one for group in self.groups for one in self.of(group, allotted[group]))]


def _times(hardware: Hardware, simulation: Simulation) -> Iterator[SiteTime]:
    """Give the seconds of each site. Raises `RecipeError` for hardware that does not say any.

    Hardware that says no seconds by site prices the products of each site alone.
    """
    cost = hardware.price(simulation, simulation.example)
    if "seconds" not in cost.totals:
        raise RecipeError(f"{hardware} says {', '.join(cost.totals)} and no seconds, so it cannot keep a budget of ms")
    told = {site: float(of["seconds"]) for site, of in cost.sites.items() if "seconds" in of}
    if not told:
        by_site = defaultdict(list)
        for work in simulation.work():
            by_site[work.site].append(work)
        told = {site: hardware.cost(works).totals["seconds"] for site, works in by_site.items()}
    for site, seconds in told.items():
        yield SiteTime(site, hardware, seconds)


def products(works: Sequence[Part]) -> list[SiteWork]:
    """The products among parts of a forward."""
    return [one for one in works if isinstance(one, SiteWork)]


TOLERANCE = 1e-6
"""The share of a budget that the integer program may spend beyond it, by rounding."""


@dataclass(frozen=True)
class Price:
    """One quantity, and the most of it that a budget allows."""

    name: str
    of: Callable[[Sequence[Part]], float]
    most: float = inf

    def allows(self, works: Sequence[Part]) -> bool:
        """True if this work costs no more than the budget."""
        return self.of(works) <= self.most * (1 + TOLERANCE)


def prices(budget: Budget, elements: Mapping[str, int], on: Sequence[Hardware]) -> list[Price]:
    """The quantities that are priced; those without a budget are reported alone.

    Raises `RecipeError` for milliseconds without hardware, and for a budget that says nothing.
    """
    if not budget.said:
        raise RecipeError("a search needs a budget: say bits, bytes, bops, or hardware and milliseconds")
    if budget.ms is not None and not on:
        raise RecipeError(f"a budget of {budget.ms:g} ms needs hardware; name it with --on")
    if not elements and (budget.bits is not None or budget.bytes is not None):
        raise RecipeError("no weight is quantized, so a budget of their bits or bytes means nothing")

    def bits(works: Sequence[Part]) -> float:
        widths = {
            one.weight: operand.bits for one in products(works) for operand in one.operands if operand.role == "weight"
        }
        return sum(many * widths[name] for name, many in elements.items() if name in widths)

    return [
        Price("bits", lambda works: bits(works) / max(sum(elements.values()), 1), _most(budget.bits)),
        Price("bytes", lambda works: bits(works) / 8, _most(budget.bytes)),
        Price("bops", _bops, _most(budget.bops)),
        *(Price(f"ms on {one}", _milliseconds(one), _most(budget.ms)) for one in on),
    ]


def check_smallest(prices: Sequence[Price], works: Works, offered: Offered) -> None:
    """Raise `QsimError` for a budget that is smaller than the least that the choices allow."""
    for price in prices:
        least = sum(
            min(price.of(works.of(group, choice)) for choice in group.choices(offered)) for group in works.groups
        ) + price.of(works.fixed)
        if least > price.most * (1 + TOLERANCE):
            raise QsimError(
                f"a budget of {price.most:g} {price.name} is too small: the least that these choices allow is "
                f"{least:.6g}; raise it, or offer formats of fewer bits"
            )


def _most(said: float | None) -> float:
    return inf if said is None else said


def _bops(works: Sequence[Part]) -> float:
    each = (one.product.multiplications * one.operands[0].width * one.operands[1].width for one in products(works))
    return float(sum(each))


def _milliseconds(hardware: Hardware) -> Callable[[Sequence[Part]], float]:
    def of(works: Sequence[Part]) -> float:
        return 1e3 * sum(one.seconds for one in works if isinstance(one, SiteTime) and one.hardware is hardware)

    return of
