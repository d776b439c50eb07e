"""Models of transformers on disk: the adapter `generic`, for families that no other adapter names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, build, write
from click.testing import CliRunner
from qsim_transformers.generic import Generic
from safetensors.torch import load_file, save_file

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.locate import Located, locate
from qsim_core.testing import AdapterSuite
from qsim_core.transforms.forward import as_in_evaluation, call


class TestGeneric(AdapterSuite):
    text = "generic"

    def checkpoint(self, folder: Path) -> Path:
        return write(build("GPT-2"), folder)


@pytest.mark.parametrize(
    ("name", "evaluator"),
    [("GPT-2", "perplexity"), ("Mamba", "perplexity"), ("ALBERT", "masked_lm"), ("Swin", "accuracy"), ("T5", "fidelity"),
     ("Whisper", "fidelity"), ("CLIP", "fidelity")],
)  # fmt: skip
def test_a_family_without_an_adapter_is_loaded_as_the_class_that_it_names(
    name: str, evaluator: str, tmp_path: Path
) -> None:
    model, example = build(name), FAMILIES[name].example

    located = locate(str(write(model, tmp_path)), qsim.Host())

    adapter, loaded = located.adapter, located.adapter.load(located.source, torch.float32)
    assert (adapter.name, adapter.evaluator_of(located.source)) == ("generic", evaluator)
    assert located.notes("float64") == [
        f"no adapter for {model.config.model_type!r} models is installed: loaded as {type(model).__name__}, and no site is "
        f"left alone unless --skip says so"
    ]
    with as_in_evaluation(model):
        assert torch.equal(call(loaded.model, example)[0], call(model, example)[0])


def test_the_command_line_says_that_there_is_no_adapter(tmp_path: Path) -> None:
    folder, text = write(build("GPT-2"), tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 10)
    command = ["evaluate", str(folder), "--precision", "w8a8", "--data", str(text), "--json", str(tmp_path / "r.json")]

    run = CliRunner().invoke(main, [*command, "-q"])

    assert run.exit_code == 0, run.output
    line = "no adapter for 'gpt2' models is installed: loaded as GPT2LMHeadModel, and no site is left alone unless --skip says so"
    assert f"Warning: {line}\n" in run.stderr
    result = qsim.Result.read(tmp_path / "r.json")
    assert (result.adapter, result.warnings, result.audit.covered) == ("generic", [line], 13)
    assert result.plugins["transformers"].distribution == "qsim-transformers"
    again = CliRunner().invoke(main, ["evaluate", "--from", str(tmp_path / "r.json"), "-q"])
    assert again.exit_code == 0, again.output


def test_a_family_that_transformers_does_not_have_either(tmp_path: Path) -> None:
    config = {"model_type": "tealeaves", "architectures": ["TeaLeavesForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(qsim.ModelError) as error:
        locate(str(tmp_path), qsim.Host())

    assert str(error.value).startswith(
        f"{tmp_path} is a 'tealeaves' model, no adapter of that name is installed (there are: "
    )
    assert "it cannot be loaded without one: " in str(error.value)


def test_a_name_that_no_hub_knows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(qsim.ModelError) as error:
        locate("acme/none", qsim.Host())

    assert str(error.value).startswith(
        "no model 'acme/none': it is neither a directory nor a model that a plugin names, and the hub did not give it ("
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("class_name", ["UNet2DModel", "DDPMPipeline"])
def test_a_directory_that_diffusers_wrote_is_of_the_family_diffusers(class_name: str, tmp_path: Path) -> None:
    file = "model_index.json" if "Pipeline" in class_name else "config.json"
    (tmp_path / file).write_text(json.dumps({"_class_name": class_name}))

    assert qsim.parse("generic").family(str(tmp_path)) == "diffusers"


def test_importing_the_plugin_imports_no_library_of_models() -> None:
    program = "import sys, qsim_transformers; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert run.stdout == "set()\n"


def quantized(folder: Path, config: dict[str, object], scale: str) -> Path:
    """Write a model with weights of float8, a scale for each, and this description of its quantization."""
    write(build("GPT-2"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name, tensor in tensors.items() if ".mlp." in name and tensor.dim() == 2]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + scale] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("scale", ["_scale", "_scale_inv"])
def test_scales_that_the_class_does_not_read_are_an_error(scale: str, tmp_path: Path) -> None:
    located = locate(str(quantized(tmp_path, {}, scale)), qsim.Host())

    with pytest.raises(qsim.ModelError, match=rf"are quantized: it holds transformer.*{scale} and \d+ more"):
        located.adapter.load(located.source, torch.float32)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors (pack-quantized)"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq (4)"),
        ({"quant_type": {"default": {}}, "quant_method": "torchao"}, "torchao"),
    ],
)
def test_a_quantized_checkpoint_is_named_beside_the_number(
    config: dict[str, object], named: str, tmp_path: Path
) -> None:
    folder = quantized(tmp_path, {"quantization_config": config}, "_scale")

    (note,) = [note for note in Located("model", str(folder), Generic(), ()).notes("float32") if "quantized" in note]

    assert note.startswith(f"its checkpoint is quantized, as {named}: the baseline has these values")


def test_modelopts_own_file_names_the_format_too(tmp_path: Path) -> None:
    folder = quantized(tmp_path, {}, "_scale")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')

    notes = Located("model", str(folder), Generic(), ()).notes("float32")

    assert "quantized, as modelopt (FP8): " in "".join(notes)
