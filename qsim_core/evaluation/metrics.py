"""Metrics with their samples, and the confidence intervals that are computed from these.

An evaluator may return any dict of numbers. `Metrics` also say how the numbers come from samples. The core then leaves
out one sample after another: the jackknife of Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter
11. The interval holds two others: Student's, and the one that follows the skewness of the samples as in Hall, 1992
(Journal of the Royal Statistical Society B 54). The first is right for symmetric samples with heavy tails, whose
skewness is chance. The second is right for skewed samples. The same sample is left out of the baseline and of the
simulated model. A sample that is hard for both then adds nothing to the uncertainty of their ratio.

Outputs that are not finite have no score, and equal outputs rank last. `rank` has both rules. `Metrics` and
`finite_outputs` have the first one for every evaluator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isnan, nan
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

Means = Mapping[str, Tensor]
TINY = 1e-12
"""Differences below this share of a number are rounding."""
NEARLY = 1e-6
"""Samples that are computed from means are as exact as this."""
SHARES = {"baseline": (0.0, 1.0), "simulated": (0.0, 1.0), "ratio": (0.0, inf), "difference": (-1.0, 1.0)}
"""The limits of shares."""
FEWEST = 8
"""Of fewer samples there is no interval: it would hold the true value less often than it says."""
FEWEST_IN_ORDER = 16
"""The same for samples that resemble their neighbours, such as the windows of a text."""


def _as_they_are(means: Means) -> Means:
    return means


class Metrics(dict[str, float]):
    """Metrics that are functions of means over samples.

    `samples` has tensors `[samples]`, such as the log-likelihood and the tokens of each window. A sample of which one
    value is NaN has no score: all its values become NaN. `of_means` makes the metrics from their means, element by
    element, for one set of means or for many: a perplexity is
    `lambda m: {"perplexity": (m["nll"] / m["tokens"]).exp()}`. Without it each mean is a metric. `counts` are numbers
    that are not uncertain. `in_order` says that neighbouring samples resemble each other, as the windows of a text do:
    intervals are wider then. `outputs` are compared with those of the same model under a recipe: the core hands the
    baseline's to the simulated run as `Run.reference`.
    """

    def __init__(
        self,
        samples: Mapping[str, Tensor],
        of_means: Callable[[Means], Means] = _as_they_are,
        *,
        counts: Mapping[str, float] | None = None,
        in_order: bool = False,
        outputs: Any = None,
    ) -> None:
        found = {name: values.detach().cpu().double() for name, values in samples.items()}
        unscored = torch.stack(list(found.values())).isnan().any(0) if found else torch.tensor(False)
        self.samples = {name: values.masked_fill(unscored, torch.nan) for name, values in found.items()}
        self.of_means = of_means
        self.counts = dict(counts or {})
        self.in_order = in_order
        self.outputs = outputs
        means = {name: values.mean() for name, values in self.samples.items()}
        super().__init__({name: float(value) for name, value in of_means(means).items()} | self.counts)

    @property
    def size(self) -> int:
        """The number of samples."""
        return len(next(iter(self.samples.values()))) if self.samples else 0

    def left_out(self) -> dict[str, Tensor]:
        """Each metric `[samples]` in float64, without the first sample, without the second, and so on."""
        means = {name: (values.sum() - values) / (self.size - 1) for name, values in self.samples.items()}
        return dict(self.of_means(means))


def rank(outputs: Tensor, chosen: Tensor, within: float = 0.0) -> Tensor:
    """The rank of element `chosen` [...] among outputs [..., n]: 1 for the largest, in float64.

    Equal outputs rank before the chosen one: a model that gives n equal outputs ranks each of them at n. Outputs that
    are smaller by `within` at most count as equal. NaN where an output is NaN.
    """
    own = outputs.gather(-1, chosen.unsqueeze(-1)) - within
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


def intervals(baseline: dict[str, float], simulated: dict[str, float]) -> dict[str, dict[str, Any]]:
    """For each metric the 95% confidence intervals of `baseline`, `simulated`, their `ratio` and their `difference`.

    Empty for a plain dict. A metric of fewer than `FEWEST` samples has none.
    """
    if not (isinstance(baseline, Metrics) and isinstance(simulated, Metrics)):
        return {}
    in_order = baseline.in_order
    fewest = FEWEST_IN_ORDER if in_order else FEWEST
    if baseline.size < fewest or baseline.size != simulated.size:
        return {}
    before, after = baseline.left_out(), simulated.left_out()
    found = {}
    for name in before.keys() & after.keys():
        b, a = (torch.tensor(metrics[name], dtype=torch.float64) for metrics in (baseline, simulated))
        if max(_moving(b, before[name]), _moving(a, after[name])) >= fewest:
            (b, without_b), (a, without_a) = with_doubt((b, before[name]), (a, after[name]))
            limits = SHARES if len(without_b) > len(before[name]) else {}
            estimates = {
                "baseline": (b, without_b),
                "simulated": (a, without_a),
                "ratio": (a / b, without_a / without_b),
                "difference": (a - b, without_a - without_b),
            }
            found[name] = {
                of: _within(interval(*estimate, in_order), *limits.get(of, (-inf, inf)))
                for of, estimate in estimates.items()
            }
    return found


def _within(found: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    """Cut an interval off at limits; NaN stays NaN."""
    return max(found[0], low), min(found[1], high)


def with_doubt(*pair: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Two values of the same samples, each with its values without one sample, as intervals of shares need them.

    Shares are means of samples from 0 to 1 of which most are 0 or 1, such as right answers. They get two samples more,
    of which each run has one right. Otherwise an interval of few wrong answers, or of few that changed, holds too
    little: without a changed answer it is empty. Source: Bonett and Price, 2012, Journal of Educational and Behavioral
    Statistics 37. Other values stay as they are.
    """
    samples = [len(left_out) * value - (len(left_out) - 1) * left_out for value, left_out in pair]
    if not all(map(_is_share, samples)):
        return pair
    more = [torch.cat([x, x.new_tensor(ends)]) for x, ends in zip(samples, ((0.0, 1.0), (1.0, 0.0)), strict=True)]
    return tuple((x.mean(), (x.sum() - x) / (len(x) - 1)) for x in more)


def _is_share(samples: Tensor) -> bool:
    whole = torch.stack([samples.abs(), (samples - 1).abs()]).amin(0) < NEARLY
    return bool(((samples > -NEARLY) & (samples < 1 + NEARLY)).all() and whole.double().mean() >= 0.5)


def _moving(value: Tensor, left_out: Tensor) -> int:
    """Count the samples that a metric depends on: all, if it is the same without any one of them."""
    moving = int(((left_out - value).abs() > TINY * value.abs()).sum())
    return moving or len(left_out)


def interval(value: Tensor, left_out: Tensor, in_order: bool = False) -> tuple[float, float]:
    """The 95% confidence interval of a value, by its values without each sample; NaN if one of them is not finite."""
    return Jackknife.of(value, left_out, in_order).interval()


@dataclass(frozen=True)
class Jackknife:
    """The uncertainty of a value that was computed from samples: its error and skewness, for `root`² samples.

    Few samples of a skewed law seldom show its tail. Their skewness is raised by 4 / samples for that.
    `benchmarks/intervals.py` shows how often the intervals hold the true value.
    """

    value: float
    error: float
    skewness: float
    root: float

    @classmethod
    def of(cls, value: Tensor, left_out: Tensor, in_order: bool = False) -> Jackknife:
        """Estimate it from the value without each sample; samples `in_order` resemble their neighbours."""
        many = len(left_out)
        parts = (many - 1) * (left_out.mean() - left_out)  # of a mean: the samples less their mean
        power = parts.square().sum()
        if power.sqrt() <= TINY * many * value.abs():
            return cls(float(value), 0.0, 0.0, math.sqrt(many))
        inflation = _inflation(float((parts[1:] * parts[:-1]).sum() / power), many) if in_order else 1.0
        error = float((power / (many - inflation) * inflation / many).sqrt())
        skewness = float((parts / power.sqrt()).pow(3).sum()) * (many + 4) / (many - 2) * math.sqrt(many - 1)
        return cls(float(value), error, skewness, math.sqrt(many / inflation))

    @property
    def degrees(self) -> float:
        """The degrees of freedom of Student's t."""
        return max(self.root**2 - 1, 2)

    def interval(self, t: float | None = None) -> tuple[float, float]:
        """The interval whose ends have Student's t and -t; None: the one of 95%."""
        t = student(self.degrees) if t is None else t
        down, up = (max(t, sign * _unskewed(sign * t, self.skewness, self.root)) for sign in (1, -1))
        return self.value - self.error * down, self.value + self.error * up


def _inflation(correlation: float, many: int) -> float:
    """The variance of a mean of samples in order over that of independent ones, under an autoregression.

    The correlation of neighbours is estimated too low (Kendall, 1954). It is corrected by twice that bias, as it is
    uncertain too.
    """
    r = min(max(correlation + (2 + 5 * correlation) / many, 0.0), 0.9)
    return (1 + r) / (1 - r) - 2 * r * (1 - r**many) / (many * (1 - r) ** 2)


def _unskewed(t: float, skewness: float, root: float) -> float:
    """The studentized mean at which Hall's transformation has the value t, for `root`² samples."""
    if abs(skewness) < TINY:
        return t
    inside = 1 + skewness * (t / root - skewness / (6 * root**2))
    return 3 * root / skewness * (math.copysign(abs(inside) ** (1 / 3), inside) - 1)


def student(degrees: float) -> float:
    """The 97.5% quantile of Student's t, by the expansion of Fisher and Cornish (1960): within 1% from 3 degrees on."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z**3 + z,
        5 * z**5 + 16 * z**3 + 3 * z,
        3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z,
    )
    return z + sum(
        term / (scale * degrees**n) for n, (term, scale) in enumerate(zip(terms, (4, 96, 384), strict=True), 1)
    )
