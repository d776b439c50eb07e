"""Metrics with their samples, and the confidence intervals that are computed from these.

An evaluator may return any dict of numbers. `Metrics` also say how the numbers come from samples. The core then draws
the samples again and again: the percentile bootstrap of Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993,
§13.3. The same ones are drawn for the baseline and for the simulated model. A sample that is hard for both then adds
nothing to the uncertainty of their ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Means = Mapping[str, Tensor]
RESAMPLES = 1000
CONFIDENCE = 0.95
AT_ONCE = 2**20
"""Numbers in memory while samples are drawn."""


def _as_they_are(means: Means) -> Means:
    return means


class Metrics(dict[str, float]):
    """Metrics that are functions of means over samples.

    `samples` has tensors `[samples]`, such as the log-likelihood and the tokens of each window. `of_means` makes the
    metrics from their means, element by element, for one set of means or for many: a perplexity is
    `lambda m: {"perplexity": (m["nll"] / m["tokens"]).exp()}`. Without it each mean is a metric. `counts` are numbers
    that are not uncertain. `outputs` are compared with those of the same model under a recipe: the core hands the
    baseline's to the simulated run as `Run.reference`.
    """

    def __init__(
        self,
        samples: Mapping[str, Tensor],
        of_means: Callable[[Means], Means] = _as_they_are,
        *,
        counts: Mapping[str, float] | None = None,
        outputs: Any = None,
    ) -> None:
        self.samples = {name: values.detach().cpu().double() for name, values in samples.items()}
        self.of_means = of_means
        self.outputs = outputs
        means = {name: values.mean() for name, values in self.samples.items()}
        super().__init__({name: float(value) for name, value in of_means(means).items()} | dict(counts or {}))

    @property
    def size(self) -> int:
        """The number of samples."""
        return len(next(iter(self.samples.values()))) if self.samples else 0

    def resampled(self, seed: int) -> dict[str, Tensor]:
        """Each metric `[RESAMPLES]` in float64, of samples drawn with replacement; a seed draws the same each time."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.stack(list(self.samples.values()), 1)
        parts = []
        for chunk in torch.arange(RESAMPLES).split(max(1, AT_ONCE // self.size)):
            drawn = torch.randint(self.size, (len(chunk), self.size), generator=generator)
            once = torch.ones(drawn.shape, dtype=values.dtype)
            times = torch.zeros_like(once).scatter_add_(1, drawn, once)
            parts.append(times @ values / self.size)
        means = torch.cat(parts)
        return dict(self.of_means(dict(zip(self.samples, means.unbind(1), strict=True))))


class Resampled(Metrics):
    """Metrics of which only the draws are known. They are enough for intervals, and small for any number of samples."""

    def __init__(self, values: Mapping[str, float], size: int, draws: Mapping[str, Tensor]) -> None:
        super().__init__({}, counts=values)
        self._size, self._draws = size, dict(draws)

    @property
    def size(self) -> int:
        return self._size

    def resampled(self, seed: int) -> dict[str, Tensor]:
        """The draws with the seed of the run; there are no others."""
        return self._draws


def intervals(baseline: dict[str, float], simulated: dict[str, float], seed: int) -> dict[str, dict[str, Any]]:
    """For each metric the confidence intervals of `baseline`, `simulated`, their `ratio` and their `difference`.

    Empty for a plain dict, and for fewer than two samples.
    """
    if not (isinstance(baseline, Metrics) and isinstance(simulated, Metrics)):
        return {}
    if baseline.size < 2 or baseline.size != simulated.size:
        return {}
    before, after = baseline.resampled(seed), simulated.resampled(seed)
    return {
        name: {
            "baseline": interval(before[name]),
            "simulated": interval(after[name]),
            "ratio": interval(after[name] / before[name]),
            "difference": interval(after[name] - before[name]),
        }
        for name in before.keys() & after.keys()
    }


def interval(values: Tensor) -> tuple[float, float]:
    """The middle `CONFIDENCE` of resampled values, ends that are among them; NaN if one of them is NaN."""
    tail = (1 - CONFIDENCE) / 2
    ends = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype), interpolation="nearest")
    return float(ends[0]), float(ends[1])
