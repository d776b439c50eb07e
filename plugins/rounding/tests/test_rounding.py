"""SignRound and AdaRound against their formulas, an exhaustive search, and values found by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite

METHODS = ["signround(30)", "adaround(60, rate=0.05)"]
SCHEMES = [
    "channel(int4)",
    "block(int3, 8)",
    "scaled(int4, 8, symmetric=false)",
    "mx(e2m1, 8)",
    "scaled(e2m1, 8, scale=scaled(e4m3, tensor))",
    "tensor(int4)",
    "block(int4, [4, 4])",
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(*weights: Tensor) -> nn.Sequential:
    made = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights))
    with torch.no_grad():
        for layer, weight in zip(made, weights, strict=True):
            layer.weight.copy_(weight)
    return made


def rounded(model: nn.Module, batches: list[Any], weights: str, text: str) -> qsim.Simulation:
    return qsim.simulate(model, {"weights": weights, "transforms": [text]}, calibration=[(x,) for x in batches])


def signround(w: Tensor, x: Tensor, steps: int) -> Tensor:
    """Algorithm 1 of arXiv 2309.05516 for symmetric integers, -7 to 7, with all gradients written out."""
    exact = w.abs().amax(1, keepdim=True) / 7
    v, a = torch.zeros_like(w), torch.ones_like(exact)
    least, best = float("inf"), w
    for step in range(steps):
        s = a * exact
        u = (w / s).clamp(-7, 7)
        q = (u.floor() + (u - u.floor() + v).round().clamp(0, 1)).clamp(-7, 7)
        error = x @ (s * q - w).T
        if float(error.square().mean()) < least:
            least, best = float(error.square().mean()), s * q
        gradient = 2 * error.T @ x / error.numel()
        inside = (w / s).abs() <= 7
        by_a = (gradient * (q - torch.where(inside, w / s, 0.0)) * exact).sum(1, keepdim=True)
        rate = (1 - step / steps) / steps
        v = (v - rate * (gradient * s).sign()).clamp(-0.5, 0.5)
        a = (a - rate * by_a.sign()).clamp(0, 1)
    return best


def test_signround_is_the_algorithm_written_out() -> None:
    weight, x = noise(6, 10), noise(40, 10, seed=1)
    model = layers(weight)

    rounded(model, [x], "channel(int4)", "signround(25)")

    assert torch.allclose(model.get_parameter("0.weight"), signround(weight, x, 25))


def test_signround_by_hand() -> None:
    """The output 0.2 + 0.45 becomes 0. All offsets grow by 1/4, which carries 0.45 past 1/2: the error falls to 0.35.

    The next offset, 1/4 - 3/16, changes nothing. Then 1/16 - 1/8 leads back to 0.
    """
    model, x = layers(torch.tensor([[7.0, 0.2, 0.45]])), torch.tensor([[0.0, 1.0, 1.0]] * 3)

    rounded(model, [x], "channel(int4)", "signround(4, ranges=false)")

    assert model.get_parameter("0.weight").tolist() == [[7.0, 0.0, 1.0]]


@pytest.mark.parametrize("text", ["signround(100, ranges=false)", "adaround(200, rate=0.05, penalty=0.001)"])
def test_it_finds_what_an_exhaustive_search_finds(text: str) -> None:
    weight, x = torch.tensor([[7.0, 0.4, 0.45, -1.4]], dtype=torch.float64), noise(50, 4).abs()
    model = layers(weight)

    rounded(model, [x], "channel(int4)", text)

    low = weight.floor()
    choices = [low + torch.tensor([[0.0, *up]]) for up in itertools.product((0.0, 1.0), repeat=3)]
    best = min(choices, key=lambda q: float((x @ (q - weight).T).square().sum()))
    assert torch.equal(model.get_parameter("0.weight"), best)


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("weights", SCHEMES)
def test_it_brings_the_outputs_nearer_to_those_of_the_original(weights: str, text: str) -> None:
    first, second, z = noise(24, 16), noise(20, 24, seed=1), noise(200, 6, seed=2) @ noise(6, 16, seed=3)
    model = layers(first, second)

    reports = rounded(model, list(z.split(50)), weights, text).reports

    exact = z @ first.T @ second.T
    with torch.no_grad():
        error = float((model(z) - exact).norm() / exact.norm())
    assert [report.changed for report in reports] == [True, True]
    assert all(report.after < report.before for report in reports)
    assert reports[1].after == pytest.approx(error)


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("weights", SCHEMES[:6])
def test_it_ends_on_the_grid(weights: str, text: str) -> None:
    model = layers(noise(24, 20).float())

    simulation = rounded(model, [noise(60, 20, seed=1).float()], weights, text)

    weight = simulation.encoded()["0.weight"]
    assert torch.equal(weight.decode(), model.get_parameter("0.weight"))


@pytest.mark.parametrize("text", METHODS)
def test_it_leaves_no_gradients_and_frozen_weights_frozen(text: str) -> None:
    model = layers(noise(8, 8), noise(8, 8, seed=1))
    model.get_parameter("0.weight").requires_grad_(False)

    rounded(model, [noise(20, 8)], "int4", text)

    assert [(p.grad, p.requires_grad) for p in model.parameters()] == [(None, False), (None, True)]


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("cast(e2m1)", r"cast\(e2m1\) does not round each element under a scale"),
        ("channel(int(4, rounding=stochastic))", "draws random numbers, or learns its scales"),
    ],
)
def test_where_nothing_can_be_learned_it_says_why(weights: str, reason: str, text: str) -> None:
    with pytest.raises(qsim.RecipeError, match=reason):
        rounded(layers(noise(8, 8)), [noise(20, 8)], weights, text)


def test_a_block_may_give_nothing_before_its_output() -> None:
    class Second(nn.Linear):
        def forward(self, x: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
            return None, super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Second(8, 8, dtype=torch.float64) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                _, x = block(x)
            return x

    reports = rounded(Model(), [noise(20, 8)], "int4", "signround(2)").reports

    assert [report.layer for report in reports] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("text", METHODS)
def test_a_model_without_gradients_is_refused(text: str) -> None:
    class Cut(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    model = nn.Sequential(Cut(8, 8, dtype=torch.float64))

    with pytest.raises(qsim.RecipeError, match=r"^\w+ needs gradients, and this model has none: element 0 of tensors"):
        rounded(model, [noise(20, 8)], "int4", text)


def test_what_another_method_has_rounded_stays() -> None:
    recipe = {"weights": "int4", "transforms": ["signround(2)", "adaround(2)"]}

    with pytest.raises(
        qsim.RecipeError, match="changed nothing in this model: left alone: it lies on its grid already"
    ):
        qsim.simulate(layers(noise(8, 8)), recipe, calibration=[(noise(20, 8),)])


def test_too_few_tokens_are_warned_of() -> None:
    with pytest.warns(qsim.CalibrationWarning, match="0 saw 3 tokens, fewer than its 8 columns: give more samples"):
        rounded(layers(noise(8, 8)), [noise(3, 8)], "int4", "signround(2)")


@pytest.mark.parametrize("text", METHODS)
def test_what_no_sample_reaches_is_left_alone(text: str) -> None:
    with pytest.raises(qsim.RecipeError, match="left alone: no calibration sample reached it"):
        rounded(layers(noise(4, 8)), [noise(0, 8)], "int4", text)


@pytest.mark.parametrize("text", METHODS)
def test_a_model_that_gives_no_tensor_is_left_alone(text: str) -> None:
    class Named(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"y": super().forward(x)}

    with pytest.raises(qsim.RecipeError, match="left alone: the model gives a dict, and no tensor that has"):
        rounded(Named(8, 4).double(), [noise(4, 8)], "int4", text)  # type: ignore[arg-type]


def test_it_learns_from_errors_that_float16_does_not_hold() -> None:
    model, x = layers(10 * noise(8, 32)).half(), 30 * noise(64, 32, seed=1).half()

    (report,) = rounded(model, [x], "int3", "signround(30)").reports

    assert report.before is not None and report.after is not None and report.after < report.before


def test_without_calibration_data_it_says_how_to_give_some() -> None:
    with pytest.raises(qsim.DataError, match="needs calibration data"):
        qsim.simulate(layers(noise(8, 8)), {"weights": "int4", "transforms": ["signround"]}, example=noise(2, 8))


def test_progress_is_shown_step_by_step() -> None:
    shown: list[str] = []

    class Count:
        def __init__(self, total: int, done: int, description: str) -> None:
            shown.append(f"{description}: {total}")

        def __enter__(self) -> Any:
            return shown.append

        def __exit__(self, *error: object) -> None:
            pass

    recipe = {"weights": "int4", "transforms": ["signround(3)"]}
    qsim.simulate(layers(noise(8, 8)), recipe, calibration=[(noise(20, 8),)], run=qsim.Run(count=Count))

    assert shown[0] == "signround 0: 3"
    assert [text.split()[0] for text in shown[1:]] == ["error"] * 3


class TestSignRound(TransformSuite):
    text = "signround(3)"


class TestAdaRound(TransformSuite):
    text = "adaround(3)"


def test_what_was_made_in_inference_mode_is_one_line() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))

    with pytest.raises(qsim.RecipeError, match="it was made under torch.inference_mode, and has no gradient$"):
        qsim.simulate(model, weights="int4", transforms=["signround(4)"], calibration=[torch.ones(8, 4)])
