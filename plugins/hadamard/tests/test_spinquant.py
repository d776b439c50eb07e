"""Learned rotations: the step against its formula, and the function that stays."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import make, tokens
from qsim_hadamard.learning import cayley
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite

BATCHES = [{"input_ids": tokens(seed)} for seed in range(3)]
FOUR_BITS = {"weights": "block(int4, 16)", "activations": "block(int4, 16)"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def simulate(model: nn.Module, transform: str, **more: Any) -> qsim.Simulation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qsim.CalibrationWarning)  # few steps on a random model may learn nothing
        return qsim.simulate(model, FOUR_BITS | {"transforms": [transform]} | more, calibration=BATCHES)


def test_a_step_of_two_channels_by_hand() -> None:
    """S = ½ [[0, 1], [-1, 0]], ‖S‖₁ = ½, α = 1.5: a turn by 2 atan(0.375), against the gradient."""
    gradient = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)

    (turned,) = cayley(torch.eye(2).double()[None], gradient, 1.5)

    expected = torch.tensor([[0.75342466, -0.65753425], [0.65753425, 0.75342466]], dtype=torch.float64)
    assert torch.allclose(turned, expected, atol=1e-8)


def test_a_step_is_the_fixed_point_that_the_authors_iterate_to() -> None:
    matrix, gradient = torch.linalg.qr(noise(8, 8)).Q, noise(8, 8, seed=1)
    skew = 0.5 * (matrix.T @ gradient - gradient.T @ matrix)
    alpha = min(1 / skew.abs().sum(0).max().item(), 0.3)
    moved = matrix.T
    for _ in range(60):
        moved = matrix.T + alpha * skew @ (0.5 * (matrix.T + moved))

    (stepped,) = cayley(matrix[None], gradient[None], 0.3)

    assert torch.allclose(stepped, moved.T, atol=1e-12)


def test_steps_reach_the_nearest_rotation_and_stay_orthogonal() -> None:
    """The rotation that is nearest to a matrix near a rotation: V Uᵀ of its singular value decomposition."""
    goal = torch.linalg.matrix_exp(noise(6, 6) - noise(6, 6).T) + 0.1 * noise(6, 6, seed=1)
    matrix = torch.eye(6).double()[None]

    for _ in range(300):
        matrix = cayley(matrix, (matrix - goal), 0.3)

    left, _, right = torch.linalg.svd(goal)
    assert torch.allclose(matrix[0], left @ right, atol=1e-8)
    assert torch.allclose(matrix[0] @ matrix[0].T, torch.eye(6).double(), atol=1e-12)


@pytest.mark.parametrize("size", ["whole", "block"])
@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama", "gpt2", "codegen"])
def test_the_function_stays(family: str, size: str) -> None:
    exact = make(family).double()(**BATCHES[0]).logits
    model = make(family).double()

    simulation = simulate(model, f"spinquant(steps=2, size={size})")
    simulation.sites.quantizing = False

    assert (model(**BATCHES[0]).logits - exact).abs().max() < 1e-5 * exact.abs().max()
    assert len([report for report in simulation.reports if "learned" in report.note]) >= 3


def test_learning_lowers_the_loss() -> None:
    """Quantizers with a true gradient: tanh stands for a format that saturates."""
    model = make("opt")

    simulation = qsim.simulate(
        model,
        weights=lambda w: (30 * w).tanh() / 30,
        activations=lambda x: (2 * x).tanh(),
        transforms=["spinquant(steps=12, lr=100)"],
        calibration=BATCHES,
    )

    (learned,) = [report for report in simulation.reports if report.note.startswith("12 steps")]
    assert learned.before is not None and learned.after is not None
    assert learned.after < 0.8 * learned.before


def test_the_same_seed_learns_the_same() -> None:
    first, again, other = make("llama"), make("llama"), make("llama")

    simulate(first, "spinquant(steps=2)")
    simulate(again, "spinquant(steps=2)")
    simulate(other, "spinquant(steps=2, seed=1)")

    weights = [model.model.layers[0].mlp.gate_proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_where_nothing_is_lost_the_first_rotations_are_kept() -> None:
    def wide(x: Tensor) -> Tensor:
        return x.clone()

    with pytest.warns(qsim.CalibrationWarning, match=r"has learned nothing in 1 steps: the first rotations are kept"):
        qsim.simulate(make("opt"), weights=wide, activations=wide, transforms=["spinquant(1)"], calibration=BATCHES)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, r"^spinquant\(2\) finds no norm that weights alone read, and no v that it can rotate; use hadamard$"),
        (
            {"activations": "tensor(int8, static=true)"},
            r"^spinquant\(2\) learns under dynamic scales, and 0 has tensor\(int8, static=true\), whose scales are found ",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(recipe: dict[str, str], message: str) -> None:
    with pytest.raises(qsim.RecipeError, match=message):
        qsim.simulate(
            nn.Sequential(nn.Linear(32, 4)),
            FOUR_BITS | {"transforms": ["spinquant(2)"]} | recipe,
            calibration=[torch.ones(1, 32)],
        )


class Block(nn.Sequential):
    """A norm and a linear, for models that cannot learn."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16), nn.Linear(16, 16))


class InPlace(Block):
    """A model that changes a tensor after a norm has read it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[1](self[0](x))
        return y.add_(self[1](self[0](y)))


class Counting(Block):
    """A model that gives a number."""

    def forward(self, x: Tensor) -> int:
        return len(super().forward(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (InPlace(), r"^spinquant\(2\) needs gradients, and this model has none: .* modified by an inplace operation"),
        (Counting(), r"^the model's output, int, has no tensor of numbers to compare in learning$"),
    ],
)
def test_a_model_without_gradients_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(qsim.QsimError, match=message):
        qsim.simulate(
            model, FOUR_BITS | {"transforms": ["spinquant(2)"]}, calibration=[noise(3, 16).float()], keep=False
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_too(dtype: torch.dtype) -> None:
    model = make("llama").to(dtype)

    simulation = simulate(model, "spinquant(2)")

    assert model(**BATCHES[0]).logits.isfinite().all()
    assert all(report.after is not None for report in simulation.reports)


class TestSpinQuant(TransformSuite):
    text = ("spinquant(steps=2)", "spinquant(steps=2, size=4, attention=false)")
