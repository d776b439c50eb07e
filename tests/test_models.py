"""From a model's directory to its adapter: by the family that its configuration names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qsim_core as qsim
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.locate import default_model, locate

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


class Anything(qsim.Adapter):
    """A fallback adapter for models of any family."""

    name = "anything"
    fallback = True

    def load(self, model: str, dtype: torch.dtype) -> qsim.LoadedModel:
        return qsim.LoadedModel(torch.nn.Linear(2, 2))

    def family(self, source: str) -> str | None:
        if source.startswith("shop:"):
            return "bought"
        raise qsim.ModelError("the shop did not have it")

    def recognizes(self, source: str) -> bool:
        if "cheap" in source:
            raise qsim.ModelError("it is too cheap")
        return True

    def note(self, source: str) -> str:
        return "bought as seen"


def bare_host(*adapters: type[qsim.Adapter]) -> qsim.Host:
    """A host of these adapters alone."""
    host = qsim.Host(discover=False)
    for adapter in adapters:
        host.register(adapter, name=f"plugin_{adapter.name}")
    return host


def test_a_fallback_adapter_loads_a_family_that_no_other_names(write: Write) -> None:
    located = locate(str(write(model_type="stranger")), bare_host(Kin, Anything))

    assert (located.adapter, located.notes("float32")) == (Anything(), ["bought as seen"])


def test_an_adapter_of_the_family_comes_before_a_fallback(write: Write) -> None:
    assert locate(str(write(model_type="cousin")), bare_host(Anything, Kin)).adapter == Kin()


def test_a_name_that_is_not_a_directory_goes_to_the_fallback_adapter() -> None:
    class Shop(Kin):
        name = "bought"

    assert locate("shop:12", bare_host(Anything, Shop)).adapter == Shop()


def test_a_fallback_adapter_says_why_it_does_not_know_a_name() -> None:
    with pytest.raises(qsim.ModelError, match="^the shop did not have it$"):
        locate("acme/none", bare_host(Anything))


def test_without_a_fallback_adapter_a_name_is_a_directory_or_an_error() -> None:
    with pytest.raises(
        qsim.ModelError,
        match="^no model 'acme/none': it is neither a directory nor a model that a plugin names, and no installed "
        "adapter looks elsewhere$",
    ):
        locate("acme/none", bare_host(Kin))


def test_a_family_that_no_adapter_recognizes_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "cheap"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "stranger"}')

    with pytest.raises(qsim.ModelError) as error:
        locate(str(folder), bare_host(Kin, Anything))

    assert str(error.value) == (
        f"{folder} is a 'stranger' model, no adapter of that name is installed (there are: kin), and it cannot be "
        f"loaded without one: it is too cheap; from Python, qsim_core.simulate takes any model"
    )


def test_two_fallback_adapters_that_recognize_a_model_are_an_error_that_names_both(write: Write) -> None:
    class Everything(Anything):
        name = "everything"

    folder = write(model_type="stranger")

    with pytest.raises(qsim.ModelError) as error:
        locate(str(folder), bare_host(Anything, Everything))

    assert str(error.value) == (
        f"{folder} is a 'stranger' model, which plugin 'plugin_anything' (inline 0) and plugin 'plugin_everything' "
        f"(inline 0) load; uninstall all but one of them"
    )


def test_a_recipe_that_names_no_model_takes_the_one_that_a_plugin_declares() -> None:
    assert default_model(qsim.Host()) == "opt-tiny"
    with pytest.raises(qsim.ModelError, match="^no model is named, and there is no default model; name one$"):
        default_model(qsim.Host(discover=False))
