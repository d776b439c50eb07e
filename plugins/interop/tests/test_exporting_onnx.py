"""ONNX models: their runtimes compute the weights and the results of the simulation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make, tokens
from numpy.typing import NDArray
from qsim_interop.writing import export
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qsim_core as qsim

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
STATIC = {
    "channel(int8)": ("tensor(int8, static=true)", 18),
    "tensor(int8, symmetric=false)": ("tensor(uint8, symmetric=false, static=true)", 18),
    "channel(e4m3)": ("tensor(e4m3, static=true)", 19),
    "block(int3, 16)": (None, 21),
    "block(uint4, 16, symmetric=false, scale=bf16)": (None, 21),
}
"""Quantizers of weights that onnxruntime computes on CPUs -> a quantizer of the inputs, and the opset."""
QUICK = {"channel(int8)", "channel(e4m3)", "block(uint4, 16, symmetric=false, scale=bf16)"}
"""One of each kind: integers, floats, and blocks with zero points."""


def perceptron() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False)).eval()


def exported(simulation: qsim.Simulation, directory: Path) -> Any:
    export(simulation, qsim.LoadedModel(simulation.model), "onnx", directory)
    return onnx.load(directory / "model.onnx")


def with_outputs(model: Any, names: list[str]) -> Any:
    """The model, which gives these inner tensors too."""
    model = copy.deepcopy(model)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return model


def computed(model: Any, x: Tensor) -> list[NDArray[Any]]:
    """The outputs by onnxruntime, which computes the nodes as they are."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return found


@pytest.mark.parametrize("weights", [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow) for w in STATIC])
def test_onnxruntime_computes_weights_and_results(weights: str, tmp_path: Path) -> None:
    activations, opset = STATIC[weights]
    simulation = qsim.simulate(perceptron(), weights=weights, activations=activations, calibration=[X * 0.7], example=X)

    model = exported(simulation, tmp_path / "out")

    encoded = simulation.encoded()
    result, *values = computed(with_outputs(model, list(encoded)), X[:3])
    assert model.opset_import[0].version == opset
    assert all(np.array_equal(value, one.decode()) for value, one in zip(values, encoded.values(), strict=True))
    np.testing.assert_allclose(result, simulation.model(X[:3]).detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("activations", "opset"), [("token(int8)", 18), ("tensor(int4)", 18), ("token(e4m3)", 19), ("tensor(e4m3)", 19)]
)
def test_scales_of_inputs_that_are_found_in_each_forward(activations: str, opset: int, tmp_path: Path) -> None:
    simulation = qsim.simulate(perceptron(), weights="int8", activations=activations, example=X)
    x = torch.cat([X * 3, torch.zeros(1, 32), X[:2] * 1e-3])

    model = exported(simulation, tmp_path / "out")

    _, values = computed(with_outputs(model, ["0_input_values"]), x)
    assert model.opset_import[0].version == opset
    assert np.array_equal(values, qsim.parse(activations).quantize(x))


@pytest.mark.parametrize(
    "weights", ["nvfp4", *(pytest.param(text, marks=pytest.mark.slow) for text in ("nvfp4_adaptive", "mxfp4"))]
)
def test_the_reference_computes_four_bit_floats(weights: str, tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    simulation = qsim.simulate(perceptron(), weights=weights, skip=["2"], example=X)

    model = exported(simulation, tmp_path / "out")

    result, weight = ReferenceEvaluator(with_outputs(model, ["0.weight"])).run(
        None, {model.graph.input[0].name: X.numpy()}
    )
    assert model.opset_import[0].version == 23
    assert np.array_equal(weight, simulation.encoded()["0.weight"].decode())
    np.testing.assert_allclose(result, simulation.model(X).detach(), atol=1e-6)


@pytest.mark.parametrize(
    "weights",
    [
        "channel(int8)",
        "block(uint4, 16, symmetric=false, scale=bf16)",
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("tensor(int8)", "block(int3, 16)")),
    ],
)
def test_a_weight_that_is_stored_transposed_stays_so(weights: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Conv1D(48, 32), nn.ReLU(), Conv1D(16, 48)).eval()
    simulation = qsim.simulate(model, weights=weights, example=X)

    found = exported(simulation, tmp_path / "out")

    encoded = simulation.encoded()
    result, *values = computed(with_outputs(found, list(encoded)), X[:3])
    assert all(np.array_equal(value, one.decode()) for value, one in zip(values, encoded.values(), strict=True))
    np.testing.assert_allclose(result, simulation.model(X[:3]).detach(), atol=1e-6)


class Embedded(nn.Module):
    """Takes ids by name, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(8, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.linear(self.table(ids))
        return x


def test_batch_and_length_stay_open_after_an_example_of_one_sequence(tmp_path: Path) -> None:
    simulation = qsim.simulate(Embedded(), weights="int8", example={"ids": torch.arange(7).view(1, 7)})

    model = exported(simulation, tmp_path / "out")

    ids = torch.arange(6).view(3, 2)
    np.testing.assert_allclose(computed(model, ids)[0], simulation.model(ids).detach(), atol=1e-6)


@pytest.mark.slow
def test_a_language_model_takes_texts_of_any_length(tmp_path: Path) -> None:
    ids = tokens()
    simulation = qsim.simulate(make("llama"), weights="block(int4, 32)", skip=["lm_head"], example={"input_ids": ids})

    model = exported(simulation, tmp_path / "out")

    np.testing.assert_allclose(computed(model, ids[:, :9])[0], simulation.model(ids[:, :9]).logits.detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"weights": "block(e4m3, [8, 8])"}, "does not hold .* exactly .it has no tiles."),
        ({"weights": "channel(int12)"}, "it holds integers of 2 to 8 bits, e4m3 and e2m1"),
        (
            {"weights": "int8", "activations": "token(int8, symmetric=false)"},
            r"do not compute token\(int8, symmetric=false\) exactly; .*static=true",
        ),
        ({"weights": "int8", "activations": "block(int8, 16)"}, r"do not compute block\(int8, n=16\) exactly"),
        ({"weights": "block(int8, 20)"}, "blocks of 20 do not divide its 32 inputs; 4 would"),
    ],
)
def test_a_recipe_without_such_nodes_is_refused(recipe: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(qsim.RecipeError, match=message):
        exported(qsim.simulate(perceptron(), **recipe, example=X), tmp_path / "out")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if float(y.sum()) > 0 else -y


def test_a_model_that_torch_cannot_trace_is_an_error_in_one_line(tmp_path: Path) -> None:
    simulation = qsim.simulate(Branching(), weights="int8", example=X)

    with pytest.raises(qsim.ModelError, match=r"^torch\.onnx cannot write this model: [^\n]+$"):
        exported(simulation, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_convolution_is_refused_by_its_class(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))

    with pytest.raises(
        qsim.RecipeError, match="^0.weight belongs to a Conv2d; such files hold codes of Linear and Conv1D"
    ):
        exported(qsim.simulate(model, weights="int8", example=torch.randn(1, 3, 8, 8)), tmp_path / "out")


def test_a_directory_under_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(qsim.ModelError, match="^.*/file is not a directory$"):
        exported(qsim.simulate(perceptron(), weights="int8", example=X), tmp_path / "file" / "out")
