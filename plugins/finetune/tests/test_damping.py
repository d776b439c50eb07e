"""Damping against its formula, and weights that stop to swing."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qsim_finetune.damping import Damping
from qsim_finetune.finetuning import finetune
from qsim_finetune.training import Training
from torch import nn

import qsim_core as qsim

X = torch.ones(4, 2)


def layer() -> nn.Linear:
    """Under a scale of 1, 0.4 is rounded to 0, -2.75 to -3, and 7 is at the end of the range."""
    made = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[7.0, 0.4], [-2.75, 7.0]]))
    return made


def step(model: nn.Module, callback: Damping, at: int, of: int = 10) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    callback.on_pre_optimizer_step(None, SimpleNamespace(global_step=at, max_steps=of), None)


def damped(model: nn.Module, strength: float, **recipe: Any) -> Damping:
    callback = Damping(qsim.simulate(model, recipe or {"weights": "channel(int4)"}, example=X), strength)
    callback.on_train_begin(None, None, None)
    return callback


@pytest.mark.parametrize(("at", "share"), [(0, 0.0), (5, 0.5), (10, 1.0)])
def test_the_gradient_is_the_formulas_and_rises_as_a_cosine(at: int, share: float) -> None:
    model = layer()

    step(model, damped(model, 0.5), at)

    expected = share * 2 * 0.5 * torch.tensor([[0.0, 0.4], [0.25, 0.0]])
    assert model.weight.grad is not None
    assert torch.allclose(model.weight.grad, expected, atol=1e-6)


def test_what_is_out_of_range_is_left_alone() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[9.0, 1.25]]))

    step(model, damped(model, 0.5, weights="cast(int4)"), at=10)

    assert model.weight.grad is not None and model.weight.grad.tolist() == [[0.0, 0.25]]


def test_swinging_weights_come_to_rest() -> None:
    """The best output, 0.45 of a step, is between two values of the grid: without damping the weight goes to and fro."""

    def changes(strength: float) -> int:
        model, x = nn.Linear(2, 1, bias=False), torch.tensor([[0.0, 1.0]])
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[7.0, 0.4]]))
        callback = Damping(qsim.simulate(model, weights="cast(int4)", example=x), strength)
        callback.on_train_begin(None, None, None)
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(60):
            optimizer.zero_grad()
            (model(x) - 0.45).square().sum().backward()
            callback.on_pre_optimizer_step(None, SimpleNamespace(global_step=10, max_steps=10), None)
            optimizer.step()
            seen.append(float(model.weight[0, 1].detach().round()))
        return sum(one != other for one, other in itertools.pairwise(seen[20:]))

    assert changes(0.0) > 10
    assert changes(2.0) == 0


def test_a_control_is_not_damped(tmp_path: Path) -> None:
    with pytest.raises(
        qsim.RecipeError, match=r"^--control trains in float32, where no weight is rounded; leave --damp"
    ):
        finetune({"model": "vit-tiny", "weights": "int4"}, tmp_path / "run", Training(damping=0.1, control=True))
