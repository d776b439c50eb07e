"""Methods in the wrong order, with too few data, or under formats that they cannot use: one clear line for each."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from families import make, tokens
from torch import Tensor

import qsim_core as qsim

BLOCKS, INTEGERS = (
    {"weights": "block(int4, 8)", "activations": "block(int4, 8)"},
    {"weights": "int4", "activations": "int8"},
)
BATCHES = [{"input_ids": tokens(seed)} for seed in range(2)]
LATE = [
    *("smoothquant", "awq", "rptq", "hadamard", "wush", "spinquant(1)", "flatquant(1)", "svdquant(4, grid=0)", "arcquant"),
    *("gptaq", "qronos", "signround(1)", "adaround(1)", "imatrix", "local_hessian", "bias_correction"),
]  # fmt: skip
FIRST = [
    *("gptq", "gptaq", "qronos", "signround(1)", "adaround(1)", "imatrix", "local_hessian"),
    *("rptq", "arcquant", "svdquant(4, grid=0)"),
]  # fmt: skip
HESSIANS = [
    *("gptq", "gptaq", "qronos", "signround(1)", "adaround(1)"),
    *("local_hessian", "wush(16)", "svdquant(4, grid=0)", "arcquant"),
]  # fmt: skip
TURNS = ["hadamard(size=24)", "wush(24)", "spinquant(1, size=24)"]
OF_SCHEMES = [
    *("gptq", "gptaq", "qronos", "signround(1)", "adaround(1)", "imatrix", "local_hessian", "rptq"),
    *("wush", "arcquant"),
]  # fmt: skip


def doubled(x: Tensor) -> Tensor:
    """A quantizer of which nothing is known."""
    return x + x


def simulate(*transforms: str, data: Any = BATCHES, **recipe: Any) -> Any:
    made = make("llama")
    exact = {name: parameter.clone() for name, parameter in made.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(fewer than|has learned nothing)", qsim.CalibrationWarning)
            chosen = BLOCKS if "rptq" not in transforms else INTEGERS
            return qsim.simulate(made, chosen | recipe | {"transforms": list(transforms)}, calibration=data)
    except qsim.QsimError as error:
        assert "\n" not in str(error)
        assert all(torch.equal(exact[name], parameter) for name, parameter in made.named_parameters())
        raise


@pytest.mark.parametrize("late", LATE)
def test_after_a_method_that_rounds_weights_each_other_is_refused(late: str) -> None:
    message = r"put .* before that one|changed nothing in this model: .*lies on its grid already"

    with pytest.raises(qsim.RecipeError, match=message):
        simulate("gptq", late)


@pytest.mark.parametrize("first", FIRST)
def test_before_a_method_that_needs_the_original_weights_each_is_refused(first: str) -> None:
    """Some leave products that nothing folds through, and then it finds nothing to do."""
    message = r"^smoothquant\(0.5\) .*put smoothquant\(0.5\) (first|before that one)"

    with pytest.raises(qsim.RecipeError, match=message):
        simulate(first, "smoothquant")


@pytest.mark.parametrize("transform", HESSIANS)
def test_too_few_samples_are_said(transform: str) -> None:
    few = [{"input_ids": tokens(0)[:1, :6]}]

    with pytest.warns(qsim.CalibrationWarning, match="saw 6 tokens, fewer than .*: give more samples$"):
        qsim.simulate(make("llama"), BLOCKS | {"transforms": [transform]}, calibration=few)


@pytest.mark.parametrize("transform", TURNS)
def test_a_size_that_does_not_divide_is_refused_with_one_that_does(transform: str) -> None:
    message = r"24 does not divide the \d+ inputs of .*; choose a size that divides \d+, as all inputs are multiples"

    with pytest.raises(qsim.RecipeError, match=re.escape(qsim.parse(transform).name) + rf".*{message}"):
        simulate(transform)


@pytest.mark.parametrize("transform", OF_SCHEMES)
def test_formats_that_a_method_cannot_use_are_refused_by_name(transform: str) -> None:
    with pytest.raises(qsim.RecipeError, match=r"function\(doubled\)"):
        simulate(transform, weights=doubled, activations=doubled)
