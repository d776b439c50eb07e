"""`qsim evaluate` on a quantized checkpoint: its codes and scales, its quantizers of inputs, and nothing rounded again."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, build, write
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.locate import locate
from qsim_core.testing import AdapterSuite
from qsim_core.transforms.forward import as_in_evaluation, call

INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
EXAMPLE = FAMILIES["Llama"].example


def int8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return {"weight": (weight / scale).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


def fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale.view(1), "input_scale": torch.tensor([0.02])}


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {
        "weight_packed": torch.full((rows, columns // 2), 0x21, dtype=torch.uint8),
        "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([100.0]),
        "input_global_scale": torch.tensor([50.0]),
    }


def quantized(folder: Path, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> Path:
    """A tiny Llama of which compressed-tensors would have packed each linear layer but the head."""
    write(build("Llama"), folder)
    tensors, pack = load_file(folder / "model.safetensors"), {8: fp8, 4: nvfp4}[weights["num_bits"]]
    pack = int8 if weights is INT8 else pack
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module, weight = name.removesuffix(".weight"), tensors.pop(name)
        tensors |= {f"{module}.{last}": tensor for last, tensor in pack(weight).items()}
    if inputs is None or inputs["dynamic"]:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("input_scale")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    form = "int-quantized" if weights is INT8 else "float-quantized"
    config = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = config | {"quantization_status": "compressed", "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def with_cache(folder: Path, scheme: dict[str, Any], scales: bool = True) -> None:
    """Let a checkpoint ask for a quantized key-value cache."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if scales and name.endswith("k_proj.weight")]:
        attention = name.removesuffix(".k_proj.weight")
        tensors |= {f"{attention}.k_scale": torch.tensor([0.03]), f"{attention}.v_scale": torch.tensor([0.02])}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def plain(folder: Path) -> Any:
    """The model with the weights of a checkpoint, dequantized by hand."""
    model, stored = build("Llama"), load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{name}_scale" in stored:
                parameter.copy_(stored[name].float() * stored[f"{name}_scale"])
    return model


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments), "-q", "--json", "-"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 10)
    return path


class TestCheckpoint(AdapterSuite):
    text = "checkpoint"

    def checkpoint(self, folder: Path) -> Path:
        return quantized(folder, INT8)


def test_the_model_has_the_weights_of_the_checkpoint_to_the_bit(tmp_path: Path) -> None:
    located = locate(str(quantized(tmp_path, INT8)), qsim.Host())

    loaded = located.adapter.load(located.source, torch.float32)

    expected = plain(tmp_path)
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in loaded.model.named_parameters())


def test_the_model_generates_as_the_checkpoint_says(tmp_path: Path) -> None:
    located = locate(str(quantized(tmp_path, INT8)), qsim.Host())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 17}')

    loaded: Any = located.adapter.load(located.source, torch.float32)

    assert loaded.model.generation_config.eos_token_id == 17


@pytest.mark.parametrize(
    ("weights", "inputs", "text"),
    [
        (INT8, {**INT8, "strategy": "token", "dynamic": True}, "token(int(8, narrow=false, convention=gptq))"),
        (FP8, {**FP8, "dynamic": True}, "tensor(e4m3)"),
    ],
)
def test_inputs_are_quantized_as_the_checkpoint_says_and_weights_are_not_rounded_again(
    weights: dict[str, Any], inputs: dict[str, Any], text: str, tmp_path: Path
) -> None:
    located = locate(str(quantized(tmp_path, weights, inputs)), qsim.Host())
    job = Job.at(located, qsim.Recipe(), qsim.Host())
    loaded = located.adapter.load(located.source, torch.float32)

    simulation = qsim.simulate(loaded.model, job.recipe, example=EXAMPLE, final=loaded.final, keep=False)

    expected = plain(tmp_path)
    inputs_alone = {f"*.{end}_proj": {"activations": text} for end in ("q", "k", "v", "o", "gate", "up", "down")}
    with qsim.simulate(expected, overrides=inputs_alone), as_in_evaluation(expected):
        assert torch.equal(call(simulation.model, EXAMPLE)[0], call(expected, EXAMPLE)[0])


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [(INT8, {**INT8, "strategy": "token", "dynamic": True}), (FP8, {**FP8, "dynamic": False})],
    ids=["int8", "static fp8"],
)
def test_the_logits_are_those_that_compressed_tensors_computes(
    weights: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("compressed_tensors")
        located = locate(str(quantized(tmp_path, weights, inputs)), qsim.Host())
        theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    job = Job.at(located, qsim.Recipe(), qsim.Host())
    loaded = located.adapter.load(located.source, torch.float32)

    with qsim.simulate(loaded.model, job.recipe, example=EXAMPLE, final=loaded.final, state=job.state()):
        ours = call(loaded.model, EXAMPLE)[0]

    assert torch.equal(ours, call(theirs, EXAMPLE)[0])


@pytest.mark.parametrize("of", [FP8, INT8], ids=["fp8", "int8"])
def test_the_cache_is_quantized_as_compressed_tensors_does(of: dict[str, Any], tmp_path: Path) -> None:
    scheme = {**of, "strategy": "tensor", "dynamic": False}
    with_cache(quantized(tmp_path, INT8), scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_library = pytest.importorskip("compressed_tensors.quantization")
        rounded = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward").fake_quantize
    args = of_library.QuantizationArgs(**scheme)

    class Quantized(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> Any:
            both = ((keys, 0.03), (values, 0.02))
            held = (rounded(x, torch.tensor([scale]), None, args) for x, scale in both)
            return super().update(*held, *more, **named)

    theirs = plain(tmp_path)
    located = locate(str(tmp_path), qsim.Host())
    job = Job.at(located, qsim.Recipe(), qsim.Host())
    loaded = located.adapter.load(located.source, torch.float32)
    dequantized = call(loaded.model, EXAMPLE)[0]

    with qsim.simulate(loaded.model, job.recipe, example=EXAMPLE, final=loaded.final, state=job.state()):
        ours = call(loaded.model, EXAMPLE)[0]

    named = "cache" if "cache" in inspect.signature(theirs.forward).parameters else "past_key_values"
    wanted = call(theirs, {**EXAMPLE, named: Quantized()})[0]
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)
    assert (ours - dequantized).abs().max() > 1e-3


def test_without_scales_of_the_cache_servers_take_one(tmp_path: Path) -> None:
    with_cache(quantized(tmp_path, INT8), {**FP8, "dynamic": False}, scales=False)

    stored = locate(str(tmp_path), qsim.Host()).stored

    assert stored is not None
    overrides = stored.recipe.record()["overrides"]
    assert overrides["*:qk"] == {"keys": "at_scale(e4m3, scale=1.0)"}
    assert overrides["*:pv"] == {"values": "at_scale(e4m3, scale=1.0)"}


def test_a_cache_with_a_scale_for_each_token_is_simulated(tmp_path: Path) -> None:
    with_cache(quantized(tmp_path, INT8), {**FP8, "strategy": "token", "dynamic": True}, scales=False)

    stored = locate(str(tmp_path), qsim.Host()).stored

    assert stored is not None
    overrides = stored.recipe.record()["overrides"]
    assert overrides["*:qk"] == {"keys": "token(e4m3)"}
    assert overrides["*:pv"] == {"values": "token(e4m3)"}
    assert not stored.notes


def test_a_cache_with_dynamic_scales_is_named(text: Path, tmp_path: Path) -> None:
    with_cache(quantized(tmp_path / "model", INT8), {**FP8, "dynamic": True}, scales=False)

    run = evaluate(tmp_path / "model", "--data", text)

    assert "Warning: the checkpoint asks for a key-value cache in tensor(e4m3), which is not simulated\n" in run.stderr


def test_static_inputs_have_the_scales_of_the_checkpoint(tmp_path: Path) -> None:
    located = locate(str(quantized(tmp_path, FP8, {**FP8, "dynamic": False})), qsim.Host())
    job = Job.at(located, qsim.Recipe(), qsim.Host())
    loaded = located.adapter.load(located.source, torch.float32)

    simulation = qsim.simulate(loaded.model, job.recipe, example=EXAMPLE, final=loaded.final, state=job.state())

    held = {name: float(scale) for name, scale in simulation.state_dict().items() if name.endswith(".scale")}
    assert set(held.values()) == {float(torch.tensor(0.02))}
    assert len(held) == len(loaded.final)


def test_the_global_scale_of_nvfp4s_inputs_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    located = locate(str(quantized(tmp_path, NVFP4, {**NVFP4, "dynamic": "local"})), qsim.Host())
    job = Job.at(located, qsim.Recipe(), qsim.Host())
    loaded = located.adapter.load(located.source, torch.float32)

    simulation = qsim.simulate(loaded.model, job.recipe, example=EXAMPLE, final=loaded.final, state=job.state())

    held = {float(scale) for name, scale in simulation.state_dict().items() if name.endswith(".scale")}
    assert held == {float(torch.tensor(0.02))}
    assert call(simulation.model, EXAMPLE)[0].isfinite().all()


def test_the_result_says_what_its_baseline_is(text: Path, tmp_path: Path) -> None:
    folder = quantized(tmp_path / "model", INT8)

    run = evaluate(folder, "--data", text)

    result = json.loads(run.stdout)
    assert run.exit_code == 0, run.output
    assert result["simulated"] == result["baseline"]
    assert result["audit"]["bits_per_weight"] > 8
    assert (
        "Warning: its weights are stored quantized, as compressed-tensors (int-quantized), and none is rounded again: the baseline "
        "is this checkpoint, dequantized, with no quantizer of inputs; --baseline MODEL compares with another\n"
    ) in run.stderr


def test_the_checkpoint_is_compared_with_the_model_that_it_was_made_from(text: Path, tmp_path: Path) -> None:
    folder, original = quantized(tmp_path / "int8", INT8), write(build("Llama"), tmp_path / "original")
    alone = json.loads(evaluate(original, "--data", text).stdout)

    run = evaluate(folder, "--data", text, "--baseline", original)

    result = json.loads(run.stdout)
    assert (result["baseline"], result["baseline_of"]) == (alone["baseline"], str(original))
    assert result["simulated"] != result["baseline"]
    assert alone["alone"]
    assert alone["simulated"] == alone["baseline"]


def test_a_record_runs_again_with_its_baseline(text: Path, tmp_path: Path) -> None:
    folder = quantized(tmp_path / "int8", INT8, {**INT8, "strategy": "token", "dynamic": True})
    original, record = write(build("Llama"), tmp_path / "original"), tmp_path / "result.json"
    record.write_text(evaluate(folder, "--data", text, "--baseline", original).stdout)

    again = json.loads(evaluate("--from", record).stdout)

    before = json.loads(record.read_text())
    assert [again[key] for key in ("baseline", "simulated", "recipe")] == [
        before[key] for key in ("baseline", "simulated", "recipe")
    ]


def test_inputs_may_be_quantized_in_another_way(text: Path, tmp_path: Path) -> None:
    folder = quantized(tmp_path / "model", INT8)

    result = json.loads(evaluate(folder, "--data", text, "--activations", "token(int4)").stdout)

    assert result["recipe"]["activations"] == "token(int4)"
    assert result["recipe"]["overrides"]["*.q_proj"] == {"weights": "channel(int(8, narrow=false, convention=gptq))"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "int4"], "are quantized already, as compressed-tensors (int-quantized); leave weights out, or take the "
         "checkpoint that it was made from"),
        (["--plugin", "smoothquant", "--activations", "int8"], "smoothquant(0.5) would change weights of "),
    ],
)  # fmt: skip
def test_weights_that_are_quantized_take_no_other_quantizer(
    options: list[str], message: str, text: Path, tmp_path: Path
) -> None:
    run = evaluate(quantized(tmp_path / "model", INT8), "--data", text, *options)

    assert run.exit_code == 1
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_missing_shard_is_one_line(text: Path, tmp_path: Path) -> None:
    folder = quantized(tmp_path / "model", INT8)
    names = load_file(folder / "model.safetensors")
    places = dict.fromkeys(names, "model.safetensors") | {"lm_head.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    run = evaluate(folder, "--data", text)

    assert run.stderr == f"Error: {folder} lacks model-2.safetensors, which holds lm_head.weight; fetch it again\n"


def test_the_commands_of_the_readme_run(text: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    commands = re.findall(r"^    qsim (.*?)(?:  +#.*)?$", readme.partition("## `qsim check`")[0], re.MULTILINE)
    names = {
        "DIR": quantized(tmp_path / "int8", INT8),
        "ORIGINAL": write(build("Llama"), tmp_path / "original"),
        "text.txt": text,
        "result.json": tmp_path / "result.json",
    }

    runs = [CliRunner().invoke(main, [str(names.get(w, w)) for w in shlex.split(command)]) for command in commands]

    assert [run.output for run in runs if run.exit_code] == []
    assert len(runs) == 4
