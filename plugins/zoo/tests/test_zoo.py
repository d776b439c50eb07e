"""The zoo's models and text: the models' function, the order of their perplexities, and reproducible training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from qsim_zoo import classified, masked, train
from qsim_zoo.causal import Causal
from qsim_zoo.outliers import CONSUMERS, add_outliers
from qsim_zoo.text import SPLITS, labelled, split_of, text
from qsim_zoo.train import TASKS

import qsim_core as qsim
from qsim_core import files
from qsim_core.evaluation.locate import locate
from qsim_core.testing import AdapterSuite


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache without models. It knows the library's docstrings, which take seconds to read."""
    folder = tmp_path_factory.mktemp("cache")
    for split in SPLITS:
        text(split)
    shutil.copytree(files.cache() / "docstrings", folder / "docstrings")
    return folder


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSIM_CACHE", str(cache))


def load(name: str) -> qsim.LoadedModel:
    located = locate(name, qsim.Host())
    return located.adapter.load(located.source, torch.float32)


def test_a_name_resolves_to_a_directory_that_opts_adapter_loads() -> None:
    located = locate("opt-tiny", qsim.Host())

    assert located.adapter.name == "opt"
    assert [component.name for component in located.components] == ["opt", "zoo"]
    assert (Path(located.source) / "model.safetensors").exists()


def test_the_zoo_loads_by_name_too() -> None:
    assert qsim.parse("zoo").load("opt-tiny", torch.float32).model.config.hidden_size == 256


def test_a_name_that_is_nearly_right_is_guessed() -> None:
    with pytest.raises(qsim.ModelError, match="did you mean 'opt-tiny'"):
        locate("opt-tinny", qsim.Host())


@pytest.mark.parametrize("model", ["opt-tiny-outliers", "opt-tiny-outliers-everywhere"])
def test_outliers_change_the_activations_and_not_the_function(model: str) -> None:
    plain, outliers = load("opt-tiny"), load(model)
    ids = torch.tensor([plain.tokenizer("The import statement combines two operations; it searches for the").input_ids])
    peaks: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            channels = output.abs().flatten(0, -2).amax(0)
            peaks.setdefault(name, []).append((channels.max() / channels.median()).item())

        return hook

    for loaded in (plain, outliers):
        for norm in CONSUMERS:
            getattr(loaded.model.model.decoder.layers[1], norm).register_forward_hook(watch(norm))
    with torch.no_grad():
        before, after = plain.model(ids).logits, outliers.model(ids).logits

    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert all(with_outliers > 4 * without for without, with_outliers in peaks.values()), peaks


def test_outliers_are_made_once_and_the_same_each_time(cache: Path) -> None:
    first = locate("opt-tiny-outliers", qsim.Host()).source
    stamp = (Path(first) / "model.safetensors").stat().st_mtime_ns

    assert locate("opt-tiny-outliers", qsim.Host()).source == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == stamp
    weights = load("opt-tiny").model.state_dict()
    again = add_outliers(weights, 4)
    made = load("opt-tiny-outliers").model.state_dict()
    assert all(torch.equal(made[name], again[name]) for name in again)


def test_outliers_everywhere_leave_no_vector_of_16_channels_without_one() -> None:
    plain, made = load("opt-tiny").model.state_dict(), load("opt-tiny-outliers-everywhere").model.state_dict()
    norm = "model.decoder.layers.0.final_layer_norm.weight"

    changed = (made[norm] / plain[norm] > 19).reshape(-1, 16)

    assert bool((changed.sum(1) == 1).all())


def test_a_document_belongs_to_one_split_by_its_name() -> None:
    assert {split_of(f"module {n}.py") for n in range(200)} == set(SPLITS)
    assert split_of("topic assert") == split_of("topic assert")


def test_splits_share_no_document_and_are_about_5_percent() -> None:
    sizes = {split: len(text(split)) for split in SPLITS}

    assert sizes["train"] > 1_000_000
    assert 0.02 < sizes["test"] / sum(sizes.values()) < 0.10
    assert text("test")[:2000] not in text("train")
    with pytest.raises(ValueError, match="no split 'dev'; there are train, valid, test"):
        text("dev")


def perplexities(model: str) -> dict[str, float]:
    """Measure perplexities of recipes over 8 windows, which are enough to show their order."""
    bench = qsim.Bench(model)
    recipes = {
        "naive": {"weights": "channel(int4)", "activations": "tensor(int4)"},
        "abfp128": {"weights": "abfp(int4, n=128)", "activations": "abfp(int4, n=128)"},
        "abfp64": {"weights": "abfp(int4, n=64)", "activations": "abfp(int4, n=64)"},
        "w4a8": {"weights": "abfp(int4, n=64)", "activations": "abfp(int8, n=64)"},
    }
    found = {}
    for name, recipe in recipes.items():
        result = bench.measure({**recipe, "outputs": "bf16"}, run=qsim.Run(limit=8)).result
        found[name] = result.simulated["perplexity"]
        found["float32"] = result.baseline["perplexity"]
    return found


@pytest.mark.parametrize("model", [pytest.param("opt-tiny", marks=pytest.mark.slow), "opt-tiny-outliers"])
def test_the_papers_order_comes_out(model: str) -> None:
    found = perplexities(model)

    assert found["naive"] > found["abfp128"] > found["abfp64"] > found["w4a8"] >= found["float32"]
    if model == "opt-tiny-outliers":
        assert found["naive"] > 100 * found["abfp64"]


TRAINED_ALIKE = {
    name for name, task in TASKS.items() if isinstance(task, type) and issubclass(task, Causal) and name != "opt-tiny"
}
"""Models that differ from opt-tiny in their shapes alone, as far as training goes."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in TRAINED_ALIKE)) for name in TASKS]
)
def test_training_goes_on_where_it_was_stopped_and_ends_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS[name]
    monkeypatch.setattr(task, "batch", 2)
    monkeypatch.setattr(task, "context", 32, raising=False)
    few_words = staticmethod(lambda split: text("test")[:5_000])
    monkeypatch.setattr(task, "text", few_words, raising=False)
    monkeypatch.setattr(masked, "text", few_words)
    monkeypatch.setattr(classified, "labelled", lambda split: tuple(part[:16] for part in labelled(split)))
    whole_step = train.Training.advance

    def run(folder: str, steps: int = 4) -> Any:
        places = ["--output", str(tmp_path / folder), "--work", str(tmp_path / f"{folder}-work")]
        return CliRunner().invoke(train.main, [name, *places, "--steps", str(steps), "--every", "2"])

    def interrupted(training: Any) -> float:
        if training.step == 3:
            raise KeyboardInterrupt
        return whole_step(training)

    monkeypatch.setattr(train.Training, "advance", interrupted)
    assert run("halves").exit_code == 1
    monkeypatch.setattr(train.Training, "advance", whole_step)
    assert "is of a run with {'steps': 4, 'seed': 0}; give another --work" in run("halves", steps=6).output

    ends = [json.loads(run(folder).stdout.splitlines()[-1]) for folder in ("halves", "whole")]

    assert ends[0] == ends[1]
    halves, whole = (sorted((tmp_path / folder).rglob("*.safetensors")) for folder in ("halves", "whole"))
    assert [file.read_bytes() for file in halves] == [file.read_bytes() for file in whole] != []


def test_a_cache_that_cannot_be_written_is_one_line_that_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QSIM_CACHE", str(tmp_path / "file"))

    with pytest.raises(qsim.ModelError) as error:
        qsim.parse("zoo").models()["opt-tiny-outliers"].directory()

    assert str(error.value) == (
        f"cannot make opt-tiny-outliers under {tmp_path}/file: Not a directory; "
        "set QSIM_CACHE to a directory with 20 MB free"
    )


class TestZoo(AdapterSuite):
    text = "zoo"

    def checkpoint(self, folder: Path) -> str:
        return "opt-tiny"
