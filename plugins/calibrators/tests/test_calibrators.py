"""The plugin's calibrators for dynamic and static scales."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.quantizers.observers import Histogram
from qsim_core.testing import CalibratorSuite


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_max_is_minmax() -> None:
    assert qsim.parse("tensor(int8, range=max)") == qsim.parse("tensor(int8, range=minmax)")


def test_entropy_cuts_a_long_tail_and_keeps_a_short_one() -> None:
    heavy = torch.cat([noise(50_000), torch.tensor([60.0])]).view(1, -1)
    uniform = torch.linspace(-1, 1, 50_000).view(1, -1)
    entropy = qsim.parse("entropy")

    (_, cut), (_, kept) = (entropy.range(x, None, None) for x in (heavy, uniform))

    assert 2.5 < cut.item() < 15
    assert kept.item() > 0.98


def bins_kept_by_tensorrt(histogram: Tensor, levels: int) -> int:
    """Return the number of bins to keep, computed bin by bin as TensorRT's slides describe it."""
    best, least = 0, float("inf")
    for bins in range(len(histogram), levels - 1, -8):
        p = histogram[:bins].clone()
        p[-1] += histogram[bins:].sum()
        q = torch.zeros(bins, dtype=torch.float64)
        for level in range(levels):
            members = [b for b in range(bins) if b * levels // bins == level]
            total, filled = sum(histogram[b] for b in members), [b for b in members if p[b] > 0]
            for b in filled:
                q[b] = total / len(filled)
        p, q = p / p.sum(), q / q.sum()
        divergence = float(sum(p[b] * (p[b] / max(float(q[b]), 1e-12)).log() for b in range(bins) if p[b] > 0))
        if divergence < least:
            best, least = bins, divergence
    return best


@pytest.mark.slow
def test_entropy_is_tensorrts_algorithm_written_out() -> None:
    """The loops take half a minute; the fast tests check the behaviour."""
    x = noise(20_000).abs() ** 1.5
    width = 2.0 ** (math.frexp(float(x.max()))[1] - 11)
    histogram = torch.bincount((x.double() / width).long()).double()

    _, high = qsim.parse("entropy(4)").range(x.view(1, -1), None, None)

    assert 1024 < len(histogram) <= 2048
    assert float(high) == pytest.approx((bins_kept_by_tensorrt(histogram, 8) + 0.5) * width)


def test_entropy_of_a_histogram_is_that_of_its_values() -> None:
    x, entropy, observer = noise(1, 5_000) ** 3, qsim.parse("entropy"), Histogram()
    observer.update(x)

    values, counts = observer.values()

    assert torch.equal(entropy.range(values, None, counts)[1], entropy.range(x, None, None)[1])


def test_a_moving_average_follows_the_batches() -> None:
    model = nn.Linear(1, 1, bias=False)
    batches = [torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[4.0]])]

    simulation = qsim.simulate(
        model, activations="tensor(int4, static=true, range=moving_average(0.5))", calibration=batches
    )

    high = ((1.0 * 0.5 + 2.0 * 0.5) * 0.5) + 4.0 * 0.5
    (site,) = simulation.sites.table.values()
    assert site.fixed["input"].scale.item() == pytest.approx(high / 7)


class OneByOne(nn.Module):
    """A layer that is called for each row of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.layer(row) for row in x.split(1)])


def test_all_calls_of_one_batch_count_as_one() -> None:
    """The batches reach up to 3 and up to 4, in whatever order their rows come."""
    model = OneByOne()
    batches = [torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0], [4.0], [1.0]])]

    simulation = qsim.simulate(
        model, activations="tensor(int4, static=true, range=moving_average(0.5))", calibration=batches
    )

    (site,) = simulation.sites.table.values()
    assert site.fixed["input"].scale.item() == pytest.approx(3.5 / 7)


@pytest.mark.parametrize("text", ["entropy(1)", "entropy(11)", "moving_average(1)", "percentile(40)"])
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(qsim.SpecError, match=" should be "):
        qsim.parse(text)


class TestCalibrators(CalibratorSuite):
    text = ("max", "entropy", "moving_average(0.5)")
