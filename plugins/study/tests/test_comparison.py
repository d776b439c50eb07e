"""Two cells differ only if their samples say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qsim_study.comparison import Comparison, holm, ranks, t_of

from qsim_core import Metrics
from qsim_core.evaluation.metrics import Jackknife


def jackknife(samples: torch.Tensor) -> Jackknife:
    metrics = Metrics({"mean": samples})
    return Jackknife.of(torch.tensor(metrics["mean"]), metrics.left_out()["mean"])


def test_an_end_of_an_interval_has_the_t_that_made_it() -> None:
    found = jackknife(torch.distributions.Exponential(1.0).sample((40,)).double())

    low, high = found.interval(2.5)

    assert t_of(found, low) == pytest.approx(2.5)
    assert t_of(found, high) == pytest.approx(-2.5)


def test_a_value_without_error_differs_from_every_other() -> None:
    found = jackknife(torch.full((20,), 3.0, dtype=torch.float64))

    assert t_of(found, 3.0) == 0.0
    assert t_of(found, 2.0) == float("inf")


def test_holm_corrects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm, 1979, by hand


def test_p_values_of_equal_models_are_uniform() -> None:
    from scipy import special

    torch.manual_seed(0)
    below = 0
    for _ in range(400):
        found = jackknife(1 + torch.distributions.Exponential(1.0).sample((32,)).double() - 1.0 + 1.0)
        below += 2 * float(special.stdtr(found.degrees, -abs(t_of(found, 2.0)))) < 0.05

    assert 0.02 < below / 400 < 0.10


class Of:
    """The part of an entry that a ranking asks for."""

    def __init__(self, model: str = "m", higher_is_better: bool = False) -> None:
        self.result, self.higher_is_better = self, higher_is_better
        self.model = model


def ranked(pairs: dict[str, tuple[float, float]], higher: bool = False) -> dict[str, tuple[int, bool]]:
    compared = [Comparison(pair[0], pair[1], ratio, ratio, ratio, p) for pair, (ratio, p) in pairs.items()]
    entries: Any = {name: Of(higher_is_better=higher) for pair in pairs for name in pair}
    return ranks(entries, compared)


def test_cells_that_are_told_apart_have_ranks_of_their_own() -> None:
    assert ranked({"ab": (0.9, 0.01), "ac": (0.8, 0.01), "bc": (0.85, 0.01)}) == {
        "a": (1, False),
        "b": (2, False),
        "c": (3, False),
    }


def test_cells_that_are_not_told_apart_share_a_rank() -> None:
    assert ranked({"ab": (0.99, 0.6), "ac": (0.8, 0.01), "bc": (0.85, 0.01)}) == {
        "a": (1, True),
        "b": (1, True),
        "c": (3, False),
    }


def test_where_higher_is_better_the_larger_one_leads() -> None:
    assert ranked({"ab": (0.9, 0.01)}, higher=True) == {"a": (2, False), "b": (1, False)}


@pytest.mark.parametrize(
    ("low", "high", "p", "settled"), [(0.9, 1.1, 0.5, False), (0.999, 1.002, 0.5, True), (1.01, 1.2, 0.001, True)]
)
def test_a_comparison_is_settled_by_a_difference_or_by_none_that_matters(
    low: float, high: float, p: float, settled: bool
) -> None:
    assert Comparison("a", "b", 1.0, low, high, p).settled(0.005) is settled
