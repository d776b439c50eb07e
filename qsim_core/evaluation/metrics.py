"""Metrics with their samples, and the confidence intervals that are computed from these.

An evaluator may return any dict of numbers. `Metrics` also say how the numbers come from samples. The core then draws
the samples again and again: the percentile bootstrap of Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993,
§13.3. The same ones are drawn for the baseline and for the simulated model. A sample that is hard for both then adds
nothing to the uncertainty of their ratio.

Outputs that are not finite have no score, and equal outputs rank last. `rank` has both rules. `Metrics` and
`finite_outputs` have the first one for every evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor, nn

Means = Mapping[str, Tensor]
RESAMPLES = 1000
CONFIDENCE = 0.95
AT_ONCE = 2**20
"""Numbers in memory while samples are drawn."""


def _as_they_are(means: Means) -> Means:
    return means


class Metrics(dict[str, float]):
    """Metrics that are functions of means over samples.

    `samples` has tensors `[samples]`, such as the log-likelihood and the tokens of each window. A sample of which one
    value is NaN has no score: all its values become NaN. `of_means` makes the metrics from their means, element by
    element, for one set of means or for many: a perplexity is
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
        found = {name: values.detach().cpu().double() for name, values in samples.items()}
        unscored = torch.stack(list(found.values())).isnan().any(0) if found else torch.tensor(False)
        self.samples = {name: values.masked_fill(unscored, torch.nan) for name, values in found.items()}
        self.of_means = of_means
        self.counts = dict(counts or {})
        self.outputs = outputs
        means = {name: values.mean() for name, values in self.samples.items()}
        super().__init__({name: float(value) for name, value in of_means(means).items()} | self.counts)

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


def rank(outputs: Tensor, chosen: Tensor) -> Tensor:
    """The rank of element `chosen` [...] among outputs [..., n]: 1 for the largest, in float64.

    Equal outputs rank before the chosen one: a model that gives n equal outputs ranks each of them at n. NaN where an
    output is NaN.
    """
    own = outputs.gather(-1, chosen.unsqueeze(-1))
    return (outputs >= own).sum(-1).double().masked_fill(outputs.isnan().any(-1), nan)


@contextmanager
def finite_outputs(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells if all outputs of the model inside were finite.

    A NaN in any tensor that the model returns is not finite. In the first tensor +Inf is not finite either, nor is
    -Inf everywhere. Other -Inf stand for what a model rules out.
    """
    largest: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        first, *others = [found.detach().amax() for found in _tensors(output)] or [torch.zeros(())]
        largest.extend([first, *(value.clamp(-1, 1) for value in others)])  # NaN stays NaN

    handle = model.register_forward_hook(see)
    try:
        yield lambda: all(bool(value.isfinite()) for value in largest)
    finally:
        handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    """List the tensors of floating-point numbers that a model returns: one, or several in order or by name."""
    if isinstance(output, Tensor):
        parts: Any = [output]
    elif isinstance(output, Mapping):
        parts = output.values()
    else:
        parts = output if isinstance(output, tuple | list) else getattr(output, "__dict__", {}).values()
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point() and part.numel()]


def unscored(metrics: dict[str, float]) -> dict[str, float]:
    """The same metrics without a score: all are NaN but the counts of `Metrics`."""
    if not isinstance(metrics, Metrics):
        return dict.fromkeys(metrics, nan)
    samples = {name: torch.full_like(values, nan) for name, values in metrics.samples.items()}
    return Metrics(samples, metrics.of_means, counts=metrics.counts, outputs=metrics.outputs)


def without_score(metrics: Mapping[str, float], label: str) -> list[str]:
    """One line that names the metrics that are NaN; no line if there are none."""
    names = [name for name, value in metrics.items() if isnan(value)]
    return [f"{label}: no score for {', '.join(names)}, as outputs are not finite"] if names else []


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
