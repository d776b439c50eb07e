"""Runs that measure the cost of a site: the recipe at this site only, and the recipe without it."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from scipy.stats import kendalltau

from qsim_core import Recipe
from qsim_core.evaluation.bench import Measured
from qsim_core.evaluation.metrics import intervals
from qsim_core.sites.site import Site
from qsim_study.blame.report import Cost, SiteBlame

KEYS = {"weight": "weights", "input": "activations", "output": "outputs"}
"""A role, and the key of a recipe where it has another name."""


def at_sites(recipe: Recipe, sites: Iterable[Site]) -> Recipe:
    """The recipe at these sites only, by an override for each."""
    overrides = {glob.escape(site.name): said for site in sites if (said := _said(site))}
    kept = {"model": recipe.model, "evaluate": recipe.evaluate, "value_axis": recipe.value_axis}
    return Recipe.of({**kept, "skip": (), "overrides": overrides})


def _said(site: Site) -> dict[str, Any]:
    """The quantizers of a site by the key of an override, and an arithmetic that is simulated."""
    plans = {KEYS.get(role, role): getattr(site.plan, role) for role in sorted(site.recipe_roles)}
    said = {key: quantizer for key, quantizer in plans.items() if quantizer is not None}
    return said | ({"arithmetic": site.plan.arithmetic} if site.plan.arithmetic.simulates else {})


def cost_of(before: dict[str, float], after: dict[str, float], metric: str, higher_is_better: bool) -> Cost:
    """The amount by which the metric is worse after than before, on the same samples."""
    sign = -1 if higher_is_better else 1
    found = intervals(before, after).get(metric)
    ends = None if found is None else sorted(sign * end + 0.0 for end in found["difference"])  # -0 becomes 0
    value = sign * (after[metric] - before[metric]) + 0.0
    return Cost(value=value, interval=None if ends is None else (ends[0], ends[1]))


def measured_sites(
    chosen: Sequence[SiteBlame],
    sites: Sequence[Site],
    recipe: Recipe,
    whole: Measured,
    metric: str,
    measure: Callable[[Recipe], Measured],
    leave_one_out: bool,
    higher_is_better: bool,
) -> Iterator[SiteBlame]:
    """Measure the chosen sites one after the other, and give each with its costs."""
    for one in chosen:
        alone = measure(at_sites(recipe, [site for site in sites if site.name == one.site]))
        found = {"alone": cost_of(whole.baseline, alone.simulated, metric, higher_is_better)}
        if leave_one_out:
            others = at_sites(recipe, [site for site in sites if site.name != one.site])
            without = measure(others).simulated if others.overrides else whole.baseline
            found["left_out"] = cost_of(without, whole.simulated, metric, higher_is_better)
        yield one.model_copy(update=found)


def tau(pairs: Iterable[tuple[float, Cost | None]]) -> float | None:
    """Kendall's tau of predicted and measured costs; None of fewer than two, or where one side has equal ones only."""
    found = [(predicted, measured.value) for predicted, measured in pairs if measured is not None]
    value = float(kendalltau(*zip(*found, strict=True)).statistic) if len(found) > 1 else math.nan
    return None if math.isnan(value) else value
