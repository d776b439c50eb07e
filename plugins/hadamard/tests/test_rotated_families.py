"""Rotations keep the function of every family of docs/coverage.md, up to the rounding of float32."""

from __future__ import annotations

import warnings

import pytest
import torch
from architectures import FAMILIES, build
from torch import Tensor

import qsim_core as qsim
from qsim_core.transforms.forward import as_in_evaluation, call

ODD = {"Mamba", "Swin v2"}
"""Families with a weight of two inputs; all others have multiples of four."""
WITHOUT_NORMS = {"XLNet", "ImageBind-like", "Stable Diffusion 3", "Flux", "nn.LSTM, bilinear", "custom operator"}
"""Families in which no norm is read by weights alone and no v can be rotated: nothing is there to be learned."""
REFUSED = {
    "spinquant(1, size={})": "finds no norm that weights alone read, and no v that it can rotate; use hadamard",
    "flatquant(1)": "needs gradients, and this model has none",
}
FEW = {"Llama", "BERT", "ViT", "GPT-2"}
"""Families that every run of the tests tries."""


def outputs(model: torch.nn.Module, name: str) -> list[Tensor]:
    with as_in_evaluation(model):
        result = call(model, FAMILIES[name].example)
    found = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else [result]
    return [x.clone() for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def wide(x: Tensor) -> Tensor:
    """A quantizer that changes nothing."""
    return x.clone()


@pytest.mark.parametrize(
    "transform", ["hadamard", "hadamard(size={})", "wush({})", "spinquant(1, size={})", "flatquant(1)"]
)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else pytest.mark.slow) for n in FAMILIES])
def test_the_function_stays(name: str, transform: str) -> None:
    model = build(name)
    exact = outputs(model, name)

    try:
        rotate(model, name, transform)
    except qsim.RecipeError as error:
        assert REFUSED[transform] in str(error)
        assert name in (WITHOUT_NORMS if "spinquant" in transform else ["custom operator"])
        return

    for before, after in zip(exact, outputs(model, name), strict=True):
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def rotate(model: torch.nn.Module, name: str, transform: str) -> None:
    text, example = transform.format(2 if name in ODD else 4), FAMILIES[name].example
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qsim.CalibrationWarning)  # of masks inside a model, of nothing to learn
        qsim.simulate(model, weights=wide, activations=wide, transforms=[text], calibration=[example], example=example)
