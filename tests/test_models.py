"""From a model's directory to its adapter: by the family that its configuration names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, build
from architectures import write as write_checkpoint
from click.testing import CliRunner

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.evaluate import Job
from qsim_core.evaluation.locate import locate
from qsim_core.transforms.forward import as_in_evaluation, call

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(model_type="x")`: a directory with that in its config.json."""

    def directory(**config: object) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return directory


class Kin(qsim.Adapter):
    name = "kin"
    families = ("cousin", "in-law")
    evaluator = "horoscope"

    def load(self, model: str, dtype: torch.dtype) -> qsim.LoadedModel:
        return qsim.LoadedModel(torch.nn.Linear(2, 2))


def host_with(*adapters: type[qsim.Adapter]) -> qsim.Host:
    host = qsim.Host()
    for number, adapter in enumerate(adapters):
        host.register(adapter, name=f"inline{number}")
    return host


@pytest.mark.parametrize("model_type", ["kin", "cousin", "in-law"])
def test_an_adapter_serves_its_own_family_and_those_that_it_names(model_type: str, write: Write) -> None:
    located = locate(str(write(model_type=model_type)), host_with(Kin))

    assert str(located.adapter) == "kin"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_checkpoint_of_sixteen_bits_is_not_doubled_in_silence(key: str, write: Write) -> None:
    located = locate(str(write(**{"model_type": "kin", key: "bfloat16"})), host_with(Kin))

    assert located.notes("float32") == [
        "its weights are stored in bfloat16 and computed in float32, which takes twice their memory; "
        "--dtype bfloat16 leaves them as they are"
    ]
    assert located.notes("bfloat16") == []


def test_two_adapters_for_one_family_are_an_error_that_names_both(write: Write) -> None:
    class Cousin(Kin):
        name = "cousin"
        families = ()

    folder = write(model_type="cousin")

    with pytest.raises(qsim.ModelError) as error:
        locate(str(folder), host_with(Kin, Cousin))

    assert str(error.value) == (
        f"{folder} is a 'cousin' model, which plugin 'inline1' (inline 0) and plugin 'inline0' (inline 0) load; "
        f"uninstall all but one of them"
    )


def test_an_evaluator_that_is_not_installed_is_named_with_what_there_is(write: Write) -> None:
    folder, host = write(model_type="kin"), host_with(Kin)

    with pytest.raises(qsim.RecipeError) as error:
        Job.of(qsim.Recipe.of({"model": str(folder)}, host), host)

    assert str(error.value).startswith(
        f"{folder} is evaluated by 'horoscope', and no evaluator of that name is installed (there are: "
    )
    assert str(error.value).endswith("); install one, or say another with `evaluate:`")


@pytest.mark.parametrize(
    ("config", "message"),
    [({"hidden_size": 8}, "{}/config.json names no model_type"), ([], "{}/config.json is not the JSON of a model's configuration")],
)  # fmt: skip
def test_a_configuration_that_names_no_family(config: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(qsim.ModelError) as error:
        locate(str(tmp_path), qsim.Host())

    assert str(error.value) == message.format(tmp_path)


@pytest.mark.parametrize(
    ("name", "evaluator"),
    [("GPT-2", "perplexity"), ("Mamba", "perplexity"), ("ALBERT", "masked_lm"), ("Swin", "accuracy"), ("T5", "fidelity"),
     ("Whisper", "fidelity"), ("CLIP", "fidelity")],
)  # fmt: skip
def test_a_family_without_an_adapter_is_loaded_as_the_class_that_it_names(
    name: str, evaluator: str, tmp_path: Path
) -> None:
    model, example = build(name), FAMILIES[name].example

    located = locate(str(write_checkpoint(model, tmp_path)), qsim.Host())

    adapter, loaded = located.adapter, located.adapter.load(located.source, torch.float32)
    assert (adapter.name, adapter.evaluator_of(located.source)) == ("generic", evaluator)
    assert located.notes("float64") == [
        f"no adapter for {model.config.model_type!r} models is installed: loaded as {type(model).__name__}, and no site is "
        f"left alone unless --skip says so"
    ]
    with as_in_evaluation(model):
        assert torch.equal(call(loaded.model, example)[0], call(model, example)[0])


def test_the_command_line_says_that_there_is_no_adapter(tmp_path: Path) -> None:
    folder, text = write_checkpoint(build("GPT-2"), tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 10)
    command = ["evaluate", str(folder), "--precision", "w8a8", "--data", str(text), "--json", str(tmp_path / "r.json")]

    run = CliRunner().invoke(main, [*command, "-q"])

    assert run.exit_code == 0, run.output
    line = "no adapter for 'gpt2' models is installed: loaded as GPT2LMHeadModel, and no site is left alone unless --skip says so"
    assert f"Warning: {line}\n" in run.stderr
    result = qsim.Result.read(tmp_path / "r.json")
    assert (result.adapter, result.warnings, result.audit.covered) == ("generic", [line], 13)
    again = CliRunner().invoke(main, ["evaluate", "--from", str(tmp_path / "r.json"), "-q"])
    assert again.exit_code == 0, again.output


def test_a_family_that_transformers_does_not_have_either(write: Write) -> None:
    folder = write(model_type="tealeaves", architectures=["TeaLeavesForCausalLM"])

    with pytest.raises(qsim.ModelError) as error:
        locate(str(folder), qsim.Host())

    assert str(error.value).startswith(
        f"{folder} is a 'tealeaves' model, no adapter of that name is installed (there are: "
    )
    assert "it cannot be loaded without one: " in str(error.value)


def test_a_name_that_no_hub_knows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(qsim.ModelError) as error:
        locate("acme/none", qsim.Host())

    assert str(error.value).startswith(
        "no model 'acme/none': it is neither a directory nor a model of the zoo, and the hub did not give it ("
    )
    assert "\n" not in str(error.value)
