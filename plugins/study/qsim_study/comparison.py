"""Comparisons of cells on the same samples, and rankings that say no more than the samples do.

Two cells that saw the same samples are compared sample by sample. The ratio of their metrics has the core's jackknife
interval. The p-value is the level at which that interval ends at 1. Holm's step-down
correction (Holm, 1979, Scandinavian Journal of Statistics 6) holds for all comparisons of one model together.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from scipy import special

from qsim_core.evaluation.metrics import FEWEST, FEWEST_IN_ORDER, TINY, Jackknife, with_doubt
from qsim_study.cell import Entry

LEVEL = 0.05
"""The share of studies without any difference in which one is decided all the same."""


@dataclass(frozen=True)
class Comparison:
    """The ratio of the metric of one cell to that of another, of the same samples."""

    first: str
    second: str
    ratio: float
    low: float
    high: float
    p: float
    """The p-value, corrected for all comparisons of the same model."""

    @property
    def decided(self) -> bool:
        """True if the samples tell the cells apart."""
        return self.p < LEVEL

    def settled(self, difference: float | None) -> bool:
        """True if the cells are told apart, or if the interval says that they differ by less than this share."""
        return self.decided or (difference is not None and 1 - difference < self.low and self.high < 1 + difference)


def comparable(first: Entry, second: Entry) -> bool:
    """True if two results are of the same model, metric and samples."""
    if first.result is None or second.result is None or first.scores is None or second.scores is None:
        return False
    a, b = first.result, second.result
    same = (a.model, a.weights, a.metric, a.evaluator, a.data.sha256, a.limit, a.seed) == (
        (b.model, b.weights, b.metric, b.evaluator, b.data.sha256, b.limit, b.seed)
    )
    return same and first.scores.left_out.keys() == second.scores.left_out.keys()


def compare(first: Entry, second: Entry, level: float = LEVEL) -> tuple[float, float, float, float] | None:
    """The ratio of the first cell's metric to the second's, its interval at a level, and the p-value.

    None for cells that did not see the same samples, or too few.
    """
    if not comparable(first, second):
        return None
    result, scores, other = first.result, first.scores, second.scores
    assert result is not None and scores is not None and other is not None
    metric, in_order = result.metric, scores.in_order
    left = [torch.tensor(one.left_out.get(metric, []), dtype=torch.float64) for one in (scores, other)]
    values = [torch.tensor(one.values[metric], dtype=torch.float64) for one in (scores, other)]
    if len(left[0]) != len(left[1]) or len(left[0]) < (FEWEST_IN_ORDER if in_order else FEWEST):
        return None
    if not bool((left[0] / left[1]).isfinite().all()):
        return None

    (value, without), (value_of_other, without_other) = with_doubt(*zip(values, left, strict=True))
    ratio, without = value / value_of_other, without / without_other
    found = Jackknife.of(ratio, without, in_order)
    low, high = found.interval(float(-special.stdtrit(found.degrees, level / 2)))
    return float(values[0] / values[1]), low, high, 2 * float(special.stdtr(found.degrees, -abs(t_of(found, 1.0))))


def t_of(found: Jackknife, point: float) -> float:
    """Student's t of a point: `found.interval(t)` has it as one of its ends; 0 for a point that is in all of them."""
    if not found.error:
        return 0.0 if found.value == point else math.copysign(math.inf, found.value - point)
    mean = (found.value - point) / found.error
    sign = math.copysign(1.0, mean)
    return sign * max(0.0, min(sign * mean, sign * _skewed(mean, found.skewness, found.root)))


def _skewed(mean: float, skewness: float, root: float) -> float:
    """Hall's transformation of a studentized mean for `root`² samples, which the ends of intervals invert."""
    if abs(skewness) < TINY:
        return mean
    inside = (1 + skewness * mean / (3 * root)) ** 3
    return root * ((inside - 1) / skewness + skewness / (6 * root**2))


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for each other by Holm's step-down method."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    found, largest = [1.0] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        found[place] = largest
    return found


def comparisons(entries: Mapping[str, Entry], looks: int = 1) -> list[Comparison]:
    """Compare every two cells of a model that saw the same samples.

    P-values are corrected for the comparisons of a model, and for `looks` at a growing number of samples (Bonferroni).
    """
    found = []
    by_model: dict[str, list[str]] = defaultdict(list)
    for key, entry in entries.items():
        if entry.result is not None:
            by_model[entry.result.model].append(key)
    for keys in by_model.values():
        pairs = itertools.combinations(keys, 2)
        compared = (((a, b), compare(entries[a], entries[b], LEVEL / looks)) for a, b in pairs)
        measured = [(pair, one) for pair, one in compared if one is not None]
        corrected = holm([p for _, (_, _, _, p) in measured])
        found += [
            Comparison(*pair, ratio, low, high, min(1.0, p * looks))
            for (pair, (ratio, low, high, _)), p in zip(measured, corrected, strict=True)
        ]
    return found


def ranks(entries: Mapping[str, Entry], compared: Iterable[Comparison]) -> dict[str, tuple[int, bool]]:
    """The rank of each cell among those of its model, and True if it shares it.

    A rank is 1 and the number of cells that are decided to be better. Cells without a comparison have no rank.
    """
    better: dict[str, int] = defaultdict(int)
    seen: dict[str, None] = {}
    for one in compared:
        seen |= {one.first: None, one.second: None}
        if one.decided:
            first_is_better = (one.ratio > 1) == entries[one.first].higher_is_better
            better[one.second if first_is_better else one.first] += 1
    found = {key: 1 + better[key] for key in seen}
    models = {key: entry.result.model for key, entry in entries.items() if entry.result is not None}
    return {
        key: (rank, any(other != key and found[other] == rank and models[other] == models[key] for other in found))
        for key, rank in found.items()
    }


@dataclass(frozen=True)
class Spread:
    """The metric of one recipe over seeds, or over draws of calibration samples."""

    what: str
    many: int
    mean: float
    deviation: float
    """The standard deviation over the seeds or draws; the uncertainty by samples is not in it."""


def spreads(entries: Mapping[str, Entry]) -> dict[str, list[Spread]]:
    """For each cell the spread of its ratio over the cells that differ from it by a seed alone."""
    found: dict[str, list[Spread]] = defaultdict(list)
    for what in ("seed", "calibration_seed"):
        groups: dict[str, list[str]] = defaultdict(list)
        for key, entry in entries.items():
            if entry.result is not None and what in entry.cell.varied:
                around = entry.cell.circumstances.model_copy(update={what: 0})
                alike = entry.cell.model_copy(update={"circumstances": around, "varied": {}, "batches": ""})
                groups[alike.model_dump_json()].append(key)
        for keys in groups.values():
            ratios = [entries[key].result.ratio for key in keys]  # type: ignore[union-attr]
            if len(keys) > 1 and all(map(isfinite, ratios)):
                spread = Spread(what, len(keys), statistics.fmean(ratios), statistics.stdev(ratios))
                for key in keys:
                    found[key].append(spread)
    return dict(found)
