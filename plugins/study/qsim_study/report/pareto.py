"""Accuracy against cost: the points of each model, and those that no other point of the model dominates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

from qsim_study.table import Row, columns

BITS = ("bits_per_weight", "bits_per_activation")
BESIDE = 0.012
"""The distance between marks of equal cost, as a share of the axis."""
WIDEST = 0.2
"""The share of the axis that all marks of one cost take at most."""


@dataclass(frozen=True)
class Point:
    """One cell."""

    key: str
    recipe: str
    cost: float
    ratio: float
    low: float
    high: float
    """The ends of the interval; the ratio itself if there is none."""
    drawn_at: float = 0.0
    """The cost, moved a little where several cells cost the same, so that their intervals can be seen."""


@dataclass(frozen=True)
class Series:
    """The cells of one model that have a cost, by cost."""

    model: str
    metric: str
    higher_is_better: bool
    points: list[Point]

    @property
    def front(self) -> list[Point]:
        """The points better than all that cost as much or less. Points of equal cost and ratio are all on it."""
        sign = -1 if self.higher_is_better else 1
        return [
            one
            for one in self.points
            if not any(
                other.cost <= one.cost
                and sign * other.ratio <= sign * one.ratio
                and (other.cost, other.ratio) != (one.cost, one.ratio)
                for other in self.points
            )
        ]


def costs(rows: list[Row]) -> list[str]:
    """The columns that are costs of at least one cell: bits, and what hardware said."""
    named = [*BITS, *(name for name in columns(rows) if " on " in name)]
    return [name for name in named if any(_is_number(row.get(name)) for row in rows)]


def series(rows: list[Row], cost: str) -> list[Series]:
    """The points of each model; cells without this cost, or without a finite ratio, are left out."""
    by_model: dict[tuple[str, str, bool], list[Point]] = {}
    for row, place in _placed(
        [row for row in rows if _is_number(row.get(cost)) and _is_number(row.get("ratio"))], cost
    ):
        ratio, ends = row["ratio"], (row["ratio_low"], row["ratio_high"])
        low, high = ends if all(map(_is_number, ends)) else (ratio, ratio)
        point = Point(row["key"], row["recipe"] or "the recipe alone", row[cost], ratio, low, high, place)
        by_model.setdefault((row["model"], row["metric"], row["higher_is_better"]), []).append(point)
    return [Series(*key, sorted(points, key=lambda point: point.drawn_at)) for key, points in by_model.items()]


def _placed(rows: list[Row], cost: str) -> Iterator[tuple[Row, float]]:
    """Rows and their places along the axis: those of equal cost side by side."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        alike.setdefault(f"{row[cost]:.6g}", []).append(row)
    amounts = [row[cost] for row in rows]
    span = (max(amounts) - min(amounts) or abs(amounts[0]) / 10) if amounts else 0.0
    for same in alike.values():
        step = span * min(BESIDE, WIDEST / len(same))
        for place, row in enumerate(same):
            yield row, row[cost] + step * (place - (len(same) - 1) / 2)


def titles(found: list[Series]) -> tuple[str, list[str]]:
    """The title of the axis of ratios, and the name of each series: what differs between models stands in the names."""

    def said(one: Series) -> tuple[str, str]:
        return one.metric, "higher is better" if one.higher_is_better else "lower is better"

    if len({said(one) for one in found}) == 1:
        metric, direction = said(found[0])
        return f"{metric}, ratio to the baseline ({direction})", [one.model for one in found]
    return "ratio to the baseline", [f"{one.model} ({', '.join(said(one))})" for one in found]


def spans_decades(found: list[Series]) -> bool:
    """True if the ratios are so far apart that only a logarithmic axis shows them all."""
    ratios = [point.ratio for one in found for point in one.points]
    return bool(ratios) and min(ratios) > 0 and max(ratios) > 10 * min(ratios)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)
