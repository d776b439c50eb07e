"""The exact text of every error class, and the hints for a name that is nearly right."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from qsim_finetune.finetuning import finetune
from safetensors.torch import save_file

import qsim_core as qsim
from qsim_core import errors
from qsim_core.cli.main import main

Qsim = Callable[..., Result]


@pytest.fixture
def qsim_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Qsim:
    """`qsim_("evaluate", …)` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


def offline_host() -> qsim.Host:
    return qsim.Host(discover=False)


def linear(**parts: Any) -> qsim.Simulation:
    return qsim.simulate(torch.nn.Linear(4, 4), example=torch.ones(2, 4), **parts)


RAISED: dict[type[Exception], tuple[Callable[[], Any], str]] = {
    qsim.QsimError: (
        lambda: linear(weights="int8", keep=False).restore(),
        "this simulation was made with keep=False: the original weights are gone; load them again",
    ),
    qsim.SpecError: (
        lambda: qsim.parse("abfp(int4, m=64)"),
        "abfp has no option 'm'. There are: element, gradient, n, range, rule, scale, static, symmetric "
        "(character 14 of 'abfp(int4, m=64)')",
    ),
    qsim.PluginError: (
        lambda: offline_host().load("abfp"),
        "no plugin 'abfp' is installed. There are: core",
    ),
    qsim.RecipeError: (
        lambda: linear(weights="int8", skip=["*"]),
        "weights: channel(int8) reached no site of this model",
    ),
    qsim.ModelError: (
        lambda: qsim.evaluate(qsim.Recipe.of({"model": "./nowhere", "weights": "int8"})),
        "there is no directory ./nowhere",
    ),
    qsim.DataError: (
        lambda: linear(weights="int4", transforms=["gptq"]),
        "gptq(0.01) needs calibration data; give simulate(…, calibration=batches), or --calibration-data",
    ),
    qsim.TrainingError: (
        lambda: finetune(qsim.Recipe.of({"model": "opt-tiny", "weights": "int4"}), Path(__file__)),
        f"{__file__} is not a directory",
    ),
}  # fmt: skip
ON_THE_COMMAND_LINE: dict[type[Exception], tuple[list[str], str]] = {
    qsim.QsimError: (["--weights", "int8", "--dtype", "int8"],
        "no dtype 'int8'. There are: bfloat16, float16, float32, float64"),
    qsim.SpecError: (["--weights", "abfp(int4, 64"], "cannot be read: '(' was never closed (character 5 of 'abfp(int4, 64')"),
    qsim.PluginError: (["--plugin", "opt"],
        "'opt' is an adapter: it is found by itself for the models it knows, and needs no --plugin"),
    qsim.RecipeError: (["--precision", "4bit"],
        "--precision is written w4a8: the bits of weights and of activations, not '4bit'"),
    qsim.ModelError: (["./nowhere", "--weights", "int8"], "there is no directory ./nowhere"),
    qsim.DataError: (["--weights", "int8", "--data", "empty.txt"],
        "empty.txt is empty: there is no text to measure perplexity on"),
}  # fmt: skip


def test_every_class_of_errors_has_its_text_here() -> None:
    defined = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__}

    assert defined == {*RAISED, qsim.CalibrationWarning}
    assert ON_THE_COMMAND_LINE.keys() == RAISED.keys() - {qsim.TrainingError}  # tests/test_finetuning.py has the others
    assert all(issubclass(cls, qsim.QsimError) for cls in RAISED)


@pytest.mark.parametrize("cls", RAISED)
def test_in_python(cls: type[Exception]) -> None:
    act, text = RAISED[cls]

    with pytest.raises(cls) as raised:
        act()

    assert (type(raised.value), str(raised.value)) == (cls, text)


@pytest.mark.parametrize("cls", ON_THE_COMMAND_LINE)
def test_on_the_command_line(cls: type[Exception], qsim_: Qsim) -> None:
    Path("empty.txt").touch()
    arguments, text = ON_THE_COMMAND_LINE[cls]

    outcome = qsim_("evaluate", *arguments)

    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (1, "", f"Error: {text}\n")


def test_a_warning() -> None:
    zeros = [torch.zeros(2, 4)]

    with pytest.warns(qsim.CalibrationWarning) as warned:
        qsim.simulate(torch.nn.Linear(4, 4), activations="tensor(int8, static=true)", calibration=zeros)

    assert [str(warning.message) for warning in warned] == ["weight (input) saw only zeros in the calibration data"]


NEARLY: dict[str, tuple[list[str], str]] = {
    "command": (["evalute"], "No such command 'evalute'. Did you mean 'evaluate'?"),
    "option of a command": (["evaluate", "--allow-code"], "No such option '--allow-code'. Did you mean '--allow-code-execution'?"),
    "plugin": (["evaluate", "--plugin", "abpf"], "no plugin 'abpf' is installed; did you mean 'abfp'?"),
    "transform": (["evaluate", "--plugin", "svdquantt"], "no plugin 'svdquantt' is installed; did you mean 'svdquant'?"),
    "component": (["components", "perplexty"], "no component 'perplexty'; did you mean 'perplexity'?"),
    "component of a kind": (["evaluate", "--weights", "e4m4"], "no quantizer 'e4m4'; did you mean 'e4m3'?"),
    "component of a plugin": (["evaluate", "--weights", "int.int44"], "no quantizer 'int.int44'; did you mean 'int4'?"),
    "option": (["evaluate", "--weights", "abfp(int4, scal=bf16)"], "abfp has no option 'scal'; did you mean 'scale'?"),
    "component to set": (["evaluate", "--plugin", "abfp", "--set", "abpf.n=8"],
                         "--set abpf.n=8: the recipe has no component 'abpf'; did you mean 'abfp'?"),
    "option to set": (["evaluate", "--plugin", "abfp", "--set", "abfp.scal=bf16"],
                      "abfp has no option 'scal'; did you mean 'scale'?"),
    "key of a recipe": (["evaluate", "--recipe", "recipe.yaml"],
                        "a recipe has no key 'weigths'; did you mean 'weights'?"),
    "key of an override": (["evaluate", "--recipe", "override.yaml"],
                           "the override of '*.fc2' has no key 'weigths'; did you mean 'weights'?"),
    "site": (["evaluate", "--weights", "int8", "--skip", "model.decoder.layers.0.self_attn.q_prj"],
             "pattern 'model.decoder.layers.0.self_attn.q_prj' matches no site; did you mean "
             "'model.decoder.layers.0.self_attn.q_proj'?"),
    "tensor": (["quantize", "w.safetensors", "o.safetensors", "--weights", "int8", "--skip", "layer.weigth"],
               "pattern 'layer.weigth' matches no tensor; did you mean 'layer.weight'?"),
    "dtype": (["evaluate", "--weights", "int8", "--dtype", "bfloat32"], "no dtype 'bfloat32'; did you mean 'float32'?"),
    "model": (["evaluate", "opt-tinny", "--weights", "int8"], "no model 'opt-tinny'; did you mean 'opt-tiny'?"),
    "directory": (["evaluate", "./modl", "--weights", "int8"], "there is no directory ./modl; did you mean 'model'?"),
    "recipe": (["evaluate", "--recipe", "recpie.yaml"],
               "cannot read recpie.yaml: No such file or directory; did you mean 'recipe.yaml'?"),
    "record": (["evaluate", "--from", "resul.json"],
               "cannot read resul.json: No such file or directory; did you mean 'result.json'?"),
    "text": (["evaluate", "--weights", "int8", "--data", "txt.txt"], "there is no file txt.txt; did you mean 'text.txt'?"),
    "tensors": (["quantize", "v.safetensors", "o.safetensors", "--weights", "int8"],
                "cannot read v.safetensors: No such file or directory; did you mean 'w.safetensors'?"),
    "codebook": (["evaluate", "--weights", "block(codebook(file='valeus.txt'), 64)"],
                 "codebook: cannot read valeus.txt: No such file or directory; did you mean 'values.txt'?"),
}  # fmt: skip


@pytest.mark.parametrize("what", NEARLY)
def test_a_name_that_is_nearly_right_gets_the_right_one(what: str, qsim_: Qsim) -> None:
    Path("model").mkdir()
    Path("recipe.yaml").write_text("weigths: int4\n")
    Path("override.yaml").write_text("weights: int4\noverrides: {'*.fc2': {weigths: int8}}\n")
    for name in ("result.json", "text.txt", "values.txt"):
        Path(name).touch()
    save_file({"layer.weight": torch.ones(4, 4)}, "w.safetensors")
    arguments, text = NEARLY[what]

    outcome = qsim_(*arguments)

    assert outcome.exit_code == (2 if what in {"command", "option of a command"} else 1)
    assert f"Error: {text}" in outcome.stderr


def test_a_file_that_has_nothing_like_it_gets_no_guess(qsim_: Qsim) -> None:
    Path("text.txt").touch()

    assert errors.file_did_you_mean(Path("zzz.yaml")) == ""
    assert errors.file_did_you_mean(Path("no/where/text.txt")) == ""
    assert errors.file_did_you_mean(Path("text.txt")) == ""  # the file exists, but its content is wrong


def test_an_override_is_a_mapping() -> None:
    with pytest.raises(qsim.RecipeError) as raised:
        qsim.Recipe.of({"overrides": {"*.fc2": "int8"}})

    assert str(raised.value) == "the override of '*.fc2' is a mapping of keys to values, not str"
