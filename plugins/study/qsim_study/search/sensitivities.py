"""The sensitivity of each group to each format: the loss that it adds to a given allotment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isnan
from typing import Any

from qsim_core import Run
from qsim_study.search.choices import Allotment, Choice, Group, Offered

Loss = Callable[[Allotment], float]
"""Measures an allotment on the samples of the search."""
Rises = dict[Group, dict[str, dict[int, float]]]
"""By group and key, and by the place of a format among those offered, the loss that it adds."""


def measured(
    loss: Loss, groups: Sequence[Group], offered: Offered, around: Allotment, before: float, run: Run
) -> Rises:
    """Measure the sensitivities around an allotment, one group and one format at a time.

    Around nothing (`{}`) every format is tried. Around a choice it is tried one step up and one step down. A loss that
    is not finite adds infinity. This is the place for a prediction that needs fewer runs.
    """
    rises: Rises = {group: {key: {} for key in group.keys} for group in groups}
    trials = []
    for group in groups:
        for key in group.keys:
            here = None if group not in around else offered[key].index(around[group][key])
            for place in range(len(offered[key])):
                if place == here:
                    rises[group][key][place] = 0.0
                elif here is None or abs(place - here) == 1:
                    trials.append((group, key, place))
    for group, key, place in run.track(trials, len(trials), "sensitivities"):
        found = loss({**around, group: {**around.get(group, {}), key: offered[key][place]}})
        rises[group][key][place] = inf if isnan(found) else found - before
    return rises


def predicted(rises: Rises, offered: Offered, group: Group, choice: Choice) -> float | None:
    """Predict the loss that a choice adds: the sum over its formats. None if one of them was not tried."""
    found = [rises[group][key].get(_place(offered[key], one)) for key, one in choice.items()]
    return None if None in found else sum(one for one in found if one is not None)


def _place(several: Sequence[Any], one: Any) -> int:
    return list(several).index(one)
