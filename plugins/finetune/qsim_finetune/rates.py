"""The learning rate that does best on data that are not trained on, of several."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from qsim_core.errors import TrainingError
from qsim_core.files import writing

TRIED = "rates.json"
"""The loss on held-out data after a trial of each rate."""
SHARE = 5
"""A trial has a fifth of the steps of the training."""


def losses_of(rates: Iterable[float], trial: Callable[[float], float], output: Path) -> dict[float, float]:
    """The loss that a trial gives for each rate; a rate that diverges has none. They are kept in `output`.

    Raises `TrainingError` if all diverge.
    """
    path, found = output / TRIED, {}
    if path.exists():
        found = {float(rate): loss for rate, loss in json.loads(path.read_bytes()).items()}
    for rate in rates:
        if rate not in found:
            try:
                found[rate] = trial(rate)
            except TrainingError:
                found[rate] = math.nan
            with writing(path) as file:
                file.write(json.dumps(found).encode())
    found = {rate: loss for rate, loss in found.items() if math.isfinite(loss)}
    if not found:
        raise TrainingError(f"the training diverges at each of the learning rates {', '.join(map(str, rates))}")
    return found


def steps_of_a_trial(steps: int | None, samples: int, epochs: float, at_once: int) -> int:
    """A fifth of the optimizer steps of a training on `samples`, of which `at_once` make one step."""
    whole = steps or math.ceil(epochs * math.ceil(samples / at_once))
    return max(1, whole // SHARE)
