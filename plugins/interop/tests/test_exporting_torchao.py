"""Directories of torchao: transformers loads tensors that dequantize to what the simulation multiplies, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make, tokens
from qsim_interop.writing import export

import qsim_core as qsim

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = tokens()
WEIGHTS = [
    "channel(int8)",
    "tensor(int4, symmetric=false)",
    "block(int4, 32)",
    "block(uint3, 16, symmetric=false, scale=bf16)",
    "block(int8, [32, 16])",
    "channel(e4m3)",
    "tensor(e4m3)",
    "nvfp4",
    "nvfp4_adaptive",
    "block(int4, 16, scale=scaled(e4m3))",
]


def exported(directory: Path, **recipe: Any) -> qsim.Simulation:
    simulation = qsim.simulate(
        make("opt"), **{"skip": ["lm_head"], **recipe}, example={"input_ids": IDS}, calibration=[{"input_ids": IDS}]
    )
    export(simulation, qsim.LoadedModel(simulation.model), "torchao", directory)
    return simulation


def loaded(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_transformers_loads_the_same_bits(weights: str, tmp_path: Path) -> None:
    simulation = exported(tmp_path / "out", weights=weights)

    model = loaded(tmp_path / "out")

    encoded = simulation.encoded()
    assert all(torch.equal(model.get_parameter(name).dequantize(), one.decode()) for name, one in encoded.items())


@pytest.mark.parametrize("weights", ["block(int4, 32)", "channel(int8)", "nvfp4"])
def test_the_model_computes_what_the_simulation_does(weights: str, tmp_path: Path) -> None:
    simulation = exported(tmp_path / "out", weights=weights)

    with torch.no_grad():
        found, wanted = (model(IDS).logits for model in (loaded(tmp_path / "out"), simulation.model))

    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("weights", "inputs"), [("mxfp4", "mxfp4"), ("mxfp8_e4m3", "mxfp8_e4m3"), ("mxfp4", "mxfp8_e4m3")]
)
def test_mx_is_multiplied_by_inputs_in_mx(weights: str, inputs: str, tmp_path: Path) -> None:
    attention = dict.fromkeys(("queries", "keys", "probabilities", "values"))
    recipe = qsim.Recipe.of({"weights": weights, "activations": inputs, "skip": ["lm_head"], **attention})
    simulation = qsim.simulate(make("opt"), recipe, example={"input_ids": IDS})
    export(simulation, qsim.LoadedModel(simulation.model), "torchao", tmp_path / "out")

    model = loaded(tmp_path / "out")

    encoded = simulation.encoded()
    assert all(torch.equal(model.get_parameter(name).dequantize(), one.decode()) for name, one in encoded.items())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, simulation.model(IDS).logits)


def test_the_codes_of_gptq_are_exported_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("qsim_gptq")
    simulation = exported(tmp_path / "out", weights="block(int4, 32)", transforms=["gptq"])

    model = loaded(tmp_path / "out")

    name = "model.decoder.layers.1.fc2.weight"
    assert torch.equal(model.get_parameter(name).dequantize(), simulation.model.get_parameter(name))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"weights": "mxfp4"}, "torchao multiplies mxfp4 by inputs in MX only; say activations: mxfp4 or mxfp8_e4m3"),
        ({"weights": "mxfp6_e2m3"}, "does not hold mxfp6_e2m3 exactly; it holds integers of 2 to 8 bits"),
        ({"weights": "block(int8, [32, 10])"}, r"tiles of \[32, 10\] do not divide its weight \[64, 64\]"),
        ({"weights": "block(int8, 24)"}, "blocks of 24 do not divide its 64 inputs; 8 would"),
    ],
)
def test_a_recipe_without_such_a_tensor_is_refused(recipe: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(qsim.RecipeError, match=message):
        exported(tmp_path / "out", **recipe)
