"""One choice for each group: the least loss under all budgets, as an integer program."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

MOST_SECONDS = 60


def cheapest_loss(
    rises: Sequence[Sequence[float]], costs: Sequence[Sequence[Sequence[float]]], most: Sequence[float]
) -> list[int] | None:
    """Choose one entry of each row of `rises`, so that their sum is least. None if no selection keeps the budgets.

    `costs` has for each budget the costs of the same entries, and `most` what their sum may be. An entry that is not
    finite is never chosen.
    """
    flat = np.array([rise for row in rises for rise in row])
    rows = [np.array([cost for row in quantity for cost in row]) for quantity in costs]
    scales = [row.max() or 1.0 for row in rows]
    budgets = [
        LinearConstraint(row / scale, -np.inf, limit / scale)
        for row, scale, limit in zip(rows, scales, most, strict=True)
    ]
    result = milp(
        np.where(np.isfinite(flat), flat, 0.0),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, [1.0 if isfinite(rise) else 0.0 for rise in flat]),
        constraints=[LinearConstraint(block_diag([np.ones((1, len(row))) for row in rises]), 1, 1), *budgets],
        options={"time_limit": MOST_SECONDS, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    ends = np.cumsum([len(row) for row in rises])
    return [int(part.argmax()) for part in np.split(result.x, ends[:-1])]
