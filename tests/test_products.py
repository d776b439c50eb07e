"""A quantizer can say what multiplies its operands: a third party's device in a few lines."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qsim_core as qsim
from qsim_core.cli.main import main


@dataclass(frozen=True)
class Truncated:
    """Products without their fraction, `times` as large."""

    times: int = 1

    def __call__(self, left: Tensor, right: Tensor, quantizers: Any) -> Tensor:
        return (self.times * (left @ right.transpose(-1, -2))).trunc()

    def __str__(self) -> str:
        return f"{self.times} truncated"


class Whole(qsim.Quantizer):
    """Whole numbers, and whole products."""

    name = "whole"
    times: int = 1

    def quantize(self, x: Tensor) -> Tensor:
        return x.round()

    @property
    def multiplier(self) -> Truncated:
        return Truncated(self.times)


def simulated(model: nn.Module, x: Any, **recipe: Any) -> Any:
    simulation = qsim.simulate(model, **({"weights": Whole(times=3), "activations": Whole(times=3)} | recipe))
    with torch.no_grad():
        return model(x), simulation


def filled(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.constant_(parameter, 1.4)
    return module


@pytest.mark.parametrize("layer", [nn.Linear(4, 2), Conv1D(2, 4), nn.Conv2d(4, 2, 1)])
def test_the_bias_is_added_to_what_the_multiplier_gives(layer: nn.Module) -> None:
    x = torch.full((1, 4, 1, 1) if isinstance(layer, nn.Conv2d) else (1, 4), 0.6)

    y, _ = simulated(filled(layer), x)

    assert y.flatten().tolist() == pytest.approx([12 + 1.4] * 2)  # 3 x 4 x 1 x 1, and the bias as it is


def test_products_of_activations_too_and_a_mask_after_the_output_is_rounded() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.baddbmm(torch.full((1, 2, 2), 0.25), x, x, beta=2, alpha=1)

    y, simulation = simulated(Masked(), torch.full((1, 2, 2), 1.2), outputs=lambda x: x + 100)

    assert y.flatten().tolist() == [6 + 100 + 0.5] * 4
    assert ":matmul.0: multiplied by 3 truncated" in simulation.audit().notes


def test_with_the_numbers_of_vectors() -> None:
    class Vectors(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x @ x[0], x[0] @ x, x[0] @ x[1]

    y, _ = simulated(Vectors(), torch.full((3, 3), 2.3))

    assert [part.tolist() for part in y] == [[36] * 3, [36] * 3, 36]


def test_it_goes_where_a_copy_of_the_model_goes() -> None:
    layer, x = filled(nn.Linear(4, 2)), torch.full((1, 4), 0.6)
    y, _ = simulated(layer, x)

    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            assert torch.equal(other(x), y)


def test_its_gradient_is_the_float_products() -> None:
    layer, x = filled(nn.Linear(4, 2)), torch.full((1, 4), 0.6, requires_grad=True)
    qsim.simulate(layer.train(), weights=Whole(), activations=Whole())

    layer(x).sum().backward()

    assert x.grad.tolist() == [[2, 2, 2, 2]]  # type: ignore[union-attr]
    assert layer.weight.grad.tolist() == [[1] * 4] * 2


@pytest.mark.parametrize(
    ("other", "stand"),
    [(None, "no quantizer and whole(3)"), (Whole(times=2), "whole(2) and whole(3)"), ("int8", "token(int8) and whole(3)")],
)  # fmt: skip
def test_it_takes_both_operands_or_says_so_at_once(other: Any, stand: str) -> None:
    with pytest.raises(qsim.RecipeError) as error:
        qsim.simulate(
            nn.Sequential(nn.Linear(4, 2)), weights=Whole(times=3), activations=other, example=torch.ones(1, 4)
        )

    assert str(error.value).endswith(
        f"truncated multiplies two operands that are quantized for it, and here stand {stand}"
    )


def test_what_is_no_product_of_two_matrices() -> None:
    class Contracted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ij,ij->", x, x)

    with pytest.raises(qsim.RecipeError) as error:
        simulated(Contracted(), torch.ones(2, 2))

    assert str(error.value).endswith(
        "matmul.0: 3 truncated multiplies matrices, and this is einsum; leave it alone with skip, or name other "
        "quantizers for it in overrides"
    )
    y, _ = simulated(Contracted(), torch.ones(2, 2), skip=["*matmul.0"])
    assert y == 4


def test_v_has_its_scales_along_the_tokens() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(-1, -2)).softmax(-1) @ x

    recipe = {"activations": Whole(), "value_axis": "head"}
    with pytest.raises(qsim.RecipeError, match="1 truncated adds along tokens, and v has its scales along the head$"):
        qsim.simulate(model := Attention(), recipe, example=torch.ones(1, 3, 4))
        model(torch.ones(1, 3, 4))


def test_one_command_evaluates_abfps_analog_device() -> None:
    options = ["--precision", "w4a8", "--set", "abfp.adc=8", "--set", "abfp.gain=8", "--set", "abfp.noise=0.5"]
    command = ["evaluate", "opt-tiny", "--plugin", "abfp", *options, "--limit", "1", "--json", "-"]

    outcome = CliRunner().invoke(main, command)

    assert outcome.exit_code == 0, outcome.output
    result = qsim.Result.model_validate_json(outcome.stdout)
    assert result.simulated["perplexity"] > result.baseline["perplexity"]
    assert result.recipe["activations"] == "abfp(int8, adc=8, gain=8.0, noise=0.5)"
