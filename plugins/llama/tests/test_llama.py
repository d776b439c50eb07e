"""The Llama adapter on directories that the test writes, one for each family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, build, write
from click.testing import CliRunner

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.locate import locate
from qsim_core.testing import AdapterSuite
from qsim_core.transforms.forward import as_in_evaluation, call

KIN = (
    "Llama", "Mistral", "Mixtral", "Phi", "Phi-3", "Qwen2", "Qwen2-MoE", "Qwen3", "Qwen3-MoE", "Gemma", "Gemma 2", "Gemma 3",
)  # fmt: skip


@pytest.mark.parametrize("name", KIN)
def test_each_family_is_loaded_bit_for_bit_and_all_but_lm_head_is_quantized(name: str, tmp_path: Path) -> None:
    model, example = build(name), FAMILIES[name].example

    located = locate(str(write(model, tmp_path)), qsim.Host())

    adapter, loaded = located.adapter, located.adapter.load(located.source, torch.float32)
    assert (adapter.name, adapter.evaluator_of(located.source)) == ("llama", "perplexity")
    with as_in_evaluation(model):
        assert torch.equal(call(loaded.model, example).logits, call(model, example).logits)
    audit = qsim.simulate(loaded.model, weights="int8", activations="int8", skip=adapter.skip, example=example).audit()
    assert (audit.skipped, audit.covered, audit.uncovered) == (["lm_head"], audit.found - 1, [])


def test_every_family_that_it_names_was_tried() -> None:
    adapter = qsim.parse("llama")

    assert {build(name).config.model_type for name in KIN} == {adapter.name, *adapter.families}


def test_from_the_command_line(tmp_path: Path) -> None:
    folder, text = write(build("Mistral"), tmp_path / "mistral"), tmp_path / "text.txt"
    text.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 10)

    run = CliRunner().invoke(main, ["evaluate", str(folder), "--precision", "w8a8", "--data", str(text), "-q"])

    assert run.exit_code == 0, run.output


def test_another_head_is_refused_in_one_line(tmp_path: Path) -> None:
    from architectures import GROUPED, pretrained

    folder = write(pretrained("LlamaForSequenceClassification", **GROUPED)(), tmp_path)

    with pytest.raises(qsim.ModelError) as error:
        qsim.parse("llama").load(str(folder), torch.float32)

    assert str(error.value) == (
        f"{folder} is of class LlamaForSequenceClassification, and adapter llama loads …ForCausalLM; from Python, "
        f"qsim_core.simulate takes any model"
    )


class TestLlama(AdapterSuite):
    text = "llama"

    def checkpoint(self, folder: Path) -> Path:
        return write(build("Qwen3"), folder)
