"""Noise in training has the distribution of the errors, evaluation is simulated, and training with it helps."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from qsim_dnf import spread
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite

DEVICE = {"weights": "abfp(int4, n=16)", "activations": "abfp(int4, n=16)", "arithmetic": "analog(adc=6)"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(*widths: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def with_noise(model: nn.Module, x: Tensor, **options: object) -> qsim.Simulation:
    recipe = {**DEVICE, "transforms": ["dnf"], **options}
    return qsim.simulate(model, calibration=list(x.split(250)), **recipe)  # type: ignore[arg-type]


@pytest.mark.parametrize("outputs", [None, "e4m3"])
def test_noise_is_distributed_as_the_errors_are(outputs: str | None) -> None:
    model, x = network(64, 32), noise(500, 64)
    with torch.no_grad():
        exact = model(x)
        with_noise(model, x, outputs=outputs)

        drawn, errors = (model.train(mode)(x) - exact for mode in (True, False))

    levels = torch.linspace(0.01, 0.99, 50)
    quantiles = [torch.quantile(values.flatten(), levels) for values in (drawn, errors)]
    assert torch.allclose(*quantiles, atol=0.1 * float(errors.std()))
    assert not torch.equal(drawn, errors)


@pytest.mark.parametrize("shape", [(2048, 1024), (500, 32), (3, 7, 64, 10), (1,), (0, 4)])
def test_the_differences_that_are_kept_come_from_all_channels_alike(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)

    places = spread(count, 4096)

    assert len(places.unique()) == len(places) == min(count, 4096)
    for axis, size in enumerate(shape[1:], start=1):
        met = torch.bincount(places // math.prod(shape[axis + 1 :]) % size, minlength=size)
        assert met.max() - met.min() <= 0.1 * met.max() + 2


def test_a_layer_that_no_sample_reaches_has_no_noise() -> None:
    model, x = network(64, 32, 8), noise(500, 64)
    model[2].register_forward_pre_hook(lambda module, args: (args[0][:0],))

    simulation = with_noise(model, x)

    assert [report.note for report in simulation.reports] == ["", "left alone: no calibration sample reached it"]


def test_evaluation_is_what_it_is_without() -> None:
    (plain, x), noisy = (network(64, 32, 8), noise(500, 64)), network(64, 32, 8)
    qsim.simulate(plain, **DEVICE)
    with_noise(noisy.train(), x)

    with torch.no_grad():
        assert torch.equal(plain.eval()(x), noisy.eval()(x))


def test_its_gradient_is_the_float_models_where_the_noise_takes_it() -> None:
    model, x = network(64, 8).train(), noise(500, 64)
    model(x).sum().backward()
    exact = model[0].weight.grad
    model[0].weight.grad = None

    with_noise(model, x)
    model(x).sum().backward()

    assert torch.equal(model[0].weight.grad, exact)


def test_noise_is_new_at_each_call_and_site_and_the_same_in_each_run() -> None:
    x = noise(500, 8)

    def drawn(transform: str) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        for layer in model:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        with_noise(model, x, transforms=[transform])
        with torch.no_grad():
            return [model.train()(x) - x for _ in range(2)]

    first, again, other = drawn("dnf"), drawn("dnf"), drawn("dnf(seed=1)")

    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


class Attention(nn.Module):
    """Two linear layers and two products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return self.out((q @ x.transpose(-1, -2)).softmax(-1) @ x)


def test_every_quantized_site_has_noise_and_says_how_much() -> None:
    model, x = Attention(), noise(500, 5, 16)

    simulation = with_noise(model, x, skip=["out"])

    assert [report.layer for report in simulation.reports] == ["q", ":matmul.0", ":matmul.1"]
    for report in simulation.reports:
        assert report.after == pytest.approx(report.before, rel=0.02)
    assert "q: in training it is not quantized: noise of 1024 bins" in simulation.audit().notes
    sites = simulation.sites.table
    assert [sites[name].in_training is None for name in ("q", ":matmul.0", ":matmul.1", "out")] == [False] * 3 + [True]
    model.train()(x).sum().backward()
    assert model.q.weight.grad.abs().sum() > 0


def test_without_calibration_data() -> None:
    with pytest.raises(qsim.DataError, match=r"^dnf\(1024\) needs calibration data; give simulate"):
        qsim.simulate(network(8, 4), weights="int4", transforms=["dnf(1024)"], example=noise(2, 8))


def test_static_scales_are_not_known_yet() -> None:
    with pytest.raises(qsim.RecipeError) as error:
        static = {"weights": "int4", "activations": "tensor(int8, static=true)", "arithmetic": "auto"}
        with_noise(network(8, 4), noise(500, 8), **static)

    assert str(error.value) == "0: the static scale of its input is found after all transforms"


CENTRES = noise(10, 16, seed=9)


def clusters(many: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around ten centres, and the number of each point's centre."""
    labels = torch.randint(10, (many,), generator=torch.Generator().manual_seed(seed))
    return CENTRES[labels] + 0.9 * noise(many, 16, seed=seed), labels


def train(model: nn.Module, steps: int, rate: float, seed: int) -> None:
    optimizer = torch.optim.Adam(model.train().parameters(), lr=rate)
    for step in range(steps):
        x, labels = clusters(128, seed * 10_000 + step)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    x, labels = clusters(4000, 77)
    return float((model(x).argmax(1) == labels).float().mean())


def test_a_network_trained_with_it_is_better_on_the_device() -> None:
    """It beats the untrained copy, and a copy that was trained as long without noise."""
    scheme = "abfp(int8, n=16)"
    device = {"weights": scheme, "activations": scheme, "arithmetic": "analog(adc=4, noise=0.5)"}
    model = network(16, 32, 32, 10)
    train(model, 400, 5e-3, seed=1)
    longer, tuned = copy.deepcopy(model), copy.deepcopy(model)

    train(longer, 150, 1e-3, seed=2)
    simulation = with_noise(tuned, clusters(500, 5)[0], **device)
    train(tuned, 150, 1e-3, seed=2)
    on_device = accuracy(tuned)
    simulation.restore()

    exact = accuracy(model)
    for other in (model, longer):
        qsim.simulate(other, **device)
    assert on_device > max(accuracy(model), accuracy(longer)) + 0.02
    assert accuracy(tuned) == pytest.approx(exact, abs=0.02)  # the trained weights stay, and are as good in float32


class TestDNF(TransformSuite):
    text = ("dnf", "dnf(bins=50)")
