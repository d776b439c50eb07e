"""Convert the harness's scores of documents into metrics with samples."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api import metrics as harness
from torch import Tensor

from qsim_core import Metrics
from qsim_core.evaluation.metrics import Means
from qsim_lm_eval.tasks import Tasks

OF_MEANS: dict[Any, Callable[[Tensor], Tensor]] = {
    harness.mean: lambda mean: mean,
    harness.nanmean: lambda mean: mean,
    harness.perplexity: lambda mean: (-mean).exp(),
    harness.weighted_perplexity: lambda mean: (-mean).exp(),
    harness.bits_per_byte: lambda mean: -mean / math.log(2),
}
"""Aggregations of the harness that are functions of Σ value / Σ weight, with that function."""


def score(results: Any, tasks: Tasks, finite: bool) -> Metrics:
    """Make metrics of the harness's results. Sample i is the i-th document of every task.

    All metrics are NaN if `finite` is false: an output of the model was not finite.

    `samples` has two columns `[most documents of a task]` for each metric: values times weights, and weights. Both are
    zero after a task's last document. A metric that is not a function of means is a number without an interval.
    """
    columns: dict[str, Tensor] = {}
    links: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
    most = max(count["effective"] for count in results["n-samples"].values())
    for name, task in tasks.tasks.items():
        for key, values in _by_metric(results["samples"][name]).items():
            aggregate = task.aggregation().get(key.partition(",")[0], harness.mean)
            weighted = [_weighted(value) if finite else (math.nan, 1.0) for value in values]
            if aggregate not in OF_MEANS or None in weighted:
                continue
            links[name, key] = OF_MEANS[aggregate]
            for column, part in zip(("sum", "weight"), zip(*weighted, strict=True), strict=True):
                columns[f"{name}/{key} {column}"] = torch.zeros(most, dtype=torch.float64)
                columns[f"{name}/{key} {column}"][: len(part)] = torch.tensor(part, dtype=torch.float64)

    def metrics(means: Means) -> Means:
        found: dict[str, dict[str, Any]] = {
            name: {"sample_len": count["effective"]} for name, count in results["n-samples"].items()
        }
        for (name, key), link in links.items():
            found[name][key] = link(means[f"{name}/{key} sum"] / means[f"{name}/{key} weight"])
        groups = {group.name: group.aggregate(found) for group in tasks.groups.values()}
        return _named({**groups, **found}, Tensor)

    rest = _named({name: results["results"][name] for name in [*tasks.groups, *tasks.tasks]}, float | int)
    known = metrics({name: values.mean() for name, values in columns.items()})
    counts = {name: float(value) if finite else math.nan for name, value in rest.items() if name not in known}
    documents = sum(count["effective"] for count in results["n-samples"].values())
    return Metrics(columns, metrics, counts={**counts, "documents": float(documents)})


def _by_metric(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Map `metric,filter` to the values of the documents in their order; None for a document without a value."""
    names = dict.fromkeys((metric, sample["filter"]) for sample in samples for metric in sample["metrics"])
    found: dict[str, list[Any]] = defaultdict(list)
    for metric, kind in names:
        found[f"{metric},{kind}"] = [sample.get(metric) for sample in samples if sample["filter"] == kind]
    return found


def _weighted(value: Any) -> tuple[float, float] | None:
    """Return a document's value times its weight, and the weight. None if the value is not a number.

    Both are zero for a document without a value.
    """
    if value is None:
        return 0.0, 0.0
    if isinstance(value, tuple) and len(value) == 2:
        return float(value[0]), float(value[1])
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return (0.0, 0.0) if math.isnan(number) else (number, 1.0)


def _named(found: dict[str, dict[str, Any]], kind: Any) -> dict[str, Any]:
    """Name metrics `task/metric`, followed by the filter if the filter has a name."""
    return {
        f"{name}/{key.removesuffix(',none')}": value
        for name, values in found.items()
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, kind)
    }
