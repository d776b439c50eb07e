"""Models that catch errors in their forward, or take derivatives in it, under transforms that look at products."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsim_core as qsim


class Two(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


class Tries(Two):
    """The same after a product that fails."""

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(RuntimeError):
            F.linear(100 * x[:, :5], self.first.weight)
        return super().forward(x)


class Falls(Two):
    """The same, with zeros where the first layer fails."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.first(x)
        except Exception:
            x = torch.zeros_like(x)
        return self.second(x)  # type: ignore[no-any-return]


class Energy(nn.Module):
    """A sum over three blocks."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers, self.out = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x).sum()  # type: ignore[no-any-return]


class Force(Energy):
    """The derivative of that sum."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(super().forward(x), x)
        return found


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def weights(model: nn.Module, transform: str) -> list[Tensor]:
    recipe = {"weights": "int4", "activations": "int8", "transforms": [transform]}
    simulation = qsim.simulate(model, recipe, calibration=list(noise(3, 16, 8)))
    return list(simulation.folded_state_dict()[0].values())


@pytest.mark.parametrize("transform", ["gptq", "gptaq", "awq", "imatrix", "local_hessian", "signround(steps=2)"])
def test_the_inputs_of_a_product_that_fails_are_not_calibration(transform: str) -> None:
    assert all(map(torch.equal, weights(Tries(), transform), weights(Two(), transform)))


@pytest.mark.parametrize("transform", ["gptq", "gptaq", "qronos"])
def test_a_model_that_takes_a_derivative_is_rounded_like_one_that_does_not(transform: str) -> None:
    assert all(map(torch.equal, weights(Force(), transform), weights(Energy(), transform)))


def test_an_error_of_a_site_that_the_model_catches_is_raised_all_the_same() -> None:
    with pytest.raises(qsim.DataError, match="^calibration batch 0 brings NaN or Inf to first; leave it out$"):
        qsim.simulate(Falls(), weights="int4", transforms=["gptq"], calibration=[torch.full((2, 8), torch.nan)])


def test_after_such_an_error_the_model_runs_again() -> None:
    model = Falls()
    with pytest.raises(qsim.DataError):
        qsim.simulate(model, weights="int4", transforms=["gptq"], calibration=[torch.full((2, 8), torch.nan)])

    simulation = qsim.simulate(model, weights="int8", example=noise(2, 8))

    assert simulation.audit().covered == 2
