"""`folded_state_dict` holds the quantized weights, names those that it lacks, and shares nothing with the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim

X = torch.linspace(-1, 1, 6 * 64).reshape(6, 64)


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


RECIPES: dict[str, dict[str, str]] = {
    "weights alone": {"weights": "int4"},
    "w4a8": {"weights": "int4", "activations": "int8"},
    "w8a8": {"weights": "int8", "activations": "int8"},
    "mxfp4": {"weights": "mxfp4", "activations": "mxfp4", "outputs": "bf16"},
    "nvfp4": {"weights": "nvfp4", "activations": "nvfp4", "outputs": "bf16"},
    "abfp": {"weights": "abfp(int4, n=64)", "activations": "abfp(int8, n=64)"},
    "int8 by name": {"weights": "int8", "activations": "int8", "arithmetic": "int8"},
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_holds_quantized_weights_whatever_multiplies_them(recipe: str, keep: bool) -> None:
    model, other = perceptron(), perceptron()
    simulation = qsim.simulate(model, **RECIPES[recipe], example=X, keep=keep)

    folded, left = simulation.folded_state_dict()

    for index, site in zip((0, 2), simulation.audit().sites, strict=True):
        assert torch.equal(folded[f"{index}.weight"], qsim.parse(site.weight)(other[index].weight.detach()))
    assert left == []


def test_a_convolution_is_folded_in_its_own_shape() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(1, 8, 6, 6)

    folded, left = qsim.simulate(
        model, weights="int8", activations="int8", outputs="bf16", example=x
    ).folded_state_dict()

    rows = qsim.parse("channel(int8)")(model[0].weight.detach().flatten(1))
    assert torch.equal(folded["0.weight"], rows.view(16, 8, 3, 3))
    assert left == []


def test_it_shares_nothing_with_the_model() -> None:
    model = perceptron()
    simulation = qsim.simulate(model, weights="int4", transforms=["gptq"], calibration=[torch.randn(256, 64)])
    folded, _ = simulation.folded_state_dict()
    before = {name: tensor.clone() for name, tensor in folded.items()}

    simulation.restore()
    for tensor in model.state_dict().values():
        tensor.zero_()

    assert all(torch.equal(folded[name], tensor) for name, tensor in before.items())


def test_tied_weights_are_left_and_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight

    folded, left = qsim.simulate(model, weights="int4", example=X).folded_state_dict()

    assert left == ["0.weight", "2.weight"]
    assert folded["0.weight"].data_ptr() == folded["2.weight"].data_ptr()


class Experts(nn.Module):
    """Two experts, of which the example reaches the first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts[int(x.sum() > 1e6)](x)
        return y


def test_layers_that_the_example_does_not_reach_are_named() -> None:
    simulation = qsim.simulate(Experts(), weights="int4", example=X)

    assert simulation.folded_state_dict()[1] == ["experts.1.weight"]


def test_layers_that_the_recipe_leaves_alone_are_not() -> None:
    simulation = qsim.simulate(perceptron(), weights="int4", skip=["2"], example=X)

    assert simulation.folded_state_dict()[1] == []


@pytest.mark.parametrize(("transform", "what"), [("hadamard", "rotations at"), ("rptq", r"\d+ hooks on the model")])
def test_weights_that_need_what_a_transform_left_are_refused(transform: str, what: str, make: Any, ids: Tensor) -> None:
    example = {"input_ids": ids}
    recipe: dict[str, Any] = {"weights": "int8", "activations": "tensor(int8, static=true)", "transforms": [transform]}
    if transform == "hadamard":
        recipe["activations"] = "int8"
    simulation = qsim.simulate(make("llama"), **recipe, example=example, calibration=[example])

    with pytest.raises(qsim.QsimError, match=f"^a transform has left {what}.*, and the weights need them"):
        simulation.folded_state_dict()


def test_without_an_example_it_says_what_it_needs() -> None:
    with pytest.raises(qsim.QsimError, match=r"^give simulate an example"):
        qsim.simulate(perceptron(), weights="int4").folded_state_dict()
