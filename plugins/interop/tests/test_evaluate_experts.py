"""`qsim evaluate` on a checkpoint of experts, which holds them one by one, and transformers stacks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, GROUPED, build, write
from click.testing import CliRunner
from qsim_interop.reading import open_checkpoint
from qsim_interop.writing import export
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.locate import locate
from qsim_core.transforms.forward import call

EXAMPLE = FAMILIES["Mixtral"].example
LEFT = ["lm_head", "*.gate"]


def exported(family: str, weights: str, folder: Path, **recipe: Any) -> qsim.Simulation:
    """A simulated model, and its directory of compressed-tensors with a tokenizer."""
    write(build(family), folder / "plain")
    parts = {"skip": LEFT, "weights": weights, "queries": None, "keys": None, "probabilities": None, "values": None}
    simulation = qsim.simulate(build(family), qsim.Recipe.of(parts | recipe), calibration=[EXAMPLE], example=EXAMPLE)
    tokenizer = AutoTokenizer.from_pretrained(folder / "plain")
    export(simulation, qsim.LoadedModel(simulation.model, tokenizer), "compressed-tensors", folder / "packed")
    return simulation


def evaluated(folder: Path) -> qsim.Simulation:
    """The simulation that `qsim evaluate` makes of a directory."""
    located = locate(str(folder), qsim.Host())
    job = Job.at(located, qsim.Recipe(), qsim.Host())
    loaded = located.adapter.load(located.source, torch.float32)
    return qsim.simulate(loaded.model, job.recipe, example=EXAMPLE, final=loaded.final, state=job.state())


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("Mixtral", "block(int4, 16, scale=bf16)"),
        ("Qwen3-MoE", "block(int4, 16, symmetric=false)"),
        ("Mixtral", "tensor(e4m3)"),
        ("Mixtral", "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))"),
        ("DeepSeek-V3", "channel(int4)"),
    ],
)
def test_experts_have_the_weights_of_the_checkpoint_to_the_bit(family: str, weights: str, tmp_path: Path) -> None:
    wanted = exported(family, weights, tmp_path).encoded()

    model = evaluated(tmp_path / "packed").model

    assert any(one.encoded.codes.dim() == 3 for one in wanted.values())
    assert all(torch.equal(model.get_parameter(name), one.decode()) for name, one in wanted.items())


@pytest.mark.parametrize("weights", ["block(int4, 16, symmetric=false)", "tensor(int8)"])
def test_their_codes_are_those_of_the_checkpoint(weights: str, tmp_path: Path) -> None:
    wanted = exported("Mixtral", weights, tmp_path).encoded()

    found = evaluated(tmp_path / "packed").encoded()

    assert all(torch.equal(found[name].decode(), one.decode()) for name, one in wanted.items())
    assert found.keys() == wanted.keys()


def test_the_inputs_of_experts_are_quantized_as_the_checkpoint_says(tmp_path: Path) -> None:
    simulation = exported("Mixtral", "channel(e4m3)", tmp_path, activations="token(e4m3)")

    ours = evaluated(tmp_path / "packed")

    assert torch.equal(call(ours.model, EXAMPLE)[0], call(simulation.model, EXAMPLE)[0])


def test_of_several_static_scales_the_largest_is_simulated_and_the_result_says_so(tmp_path: Path) -> None:
    exported("Mixtral", "tensor(e4m3)", tmp_path, activations="tensor(e4m3, static=true)")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.block_sparse_moe.experts.1.w3.input_scale"] = torch.tensor([7.0])
    save_file(tensors, file, {"format": "pt"})

    stored = locate(str(tmp_path / "packed"), qsim.Host()).stored

    assert stored is not None
    assert float(stored.state["model.layers.0.mlp.experts.gate_up_proj:input.scale"]) == 7
    assert stored.notes == (
        "model.layers.0.mlp.experts.gate_up_proj: the layers that it joins have 8 scales of inputs, which differ; the "
        "largest is simulated, as vLLM computes",
    )


def test_experts_of_which_one_is_not_packed_are_one_line(tmp_path: Path) -> None:
    exported("Mixtral", "channel(e4m3)", tmp_path)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name] = tensors[name].float() * tensors.pop(f"{name}_scale")
    save_file(tensors, file, {"format": "pt"})

    run = CliRunner().invoke(main, ["evaluate", str(tmp_path / "packed"), "-q"])

    assert run.stderr == (
        f"Error: {tmp_path / 'packed'}: model.layers.0.mlp.experts.gate_up_proj holds "
        f"model.layers.0.block_sparse_moe.experts.0.w1.weight, which is quantized, and other rows that are not\n"
    )


def test_the_tiles_of_deepseeks_experts_are_read(tmp_path: Path) -> None:
    folder = write(build("DeepSeek-V3"), tmp_path / "fp8")
    wanted: dict[str, Tensor] = {}
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tiles = tensors[name].unflatten(0, (-1, 8)).unflatten(-1, (-1, 8))
        scale = tiles.abs().amax((1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        wanted[name] = (codes.float() * scale[:, None, :, None]).reshape(tensors[name].shape)
        tensors[name] = codes.reshape(tensors[name].shape)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": method}))

    simulation = evaluated(folder)

    stack = simulation.model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert len(open_checkpoint(folder).layers) == len(wanted)
    both = [wanted[f"model.layers.1.mlp.experts.5.{end}_proj.weight"] for end in ("gate", "up")]
    assert torch.equal(stack[5], torch.cat(both))
    assert simulation.recipe.record()["overrides"]["*.gate_up_proj"]["weights"] == "block(e4m3, n=[8, 8])"


def gpt_oss(folder: Path) -> dict[str, Tensor]:
    """A checkpoint of a tiny gpt-oss, experts in MXFP4; give what transformers dequantizes of them, in float32."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = GptOssConfig(**GROUPED | {"intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2)
    write(GptOssForCausalLM(config), folder)
    tensors, wanted = load_file(folder / "model.safetensors"), {}
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(118, 122, (experts, rows, columns // 32), dtype=torch.uint8, generator=random)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": method}))
    return wanted


@pytest.mark.filterwarnings("ignore")
def test_gpt_oss_has_the_weights_that_transformers_dequantizes(tmp_path: Path) -> None:
    wanted = gpt_oss(tmp_path)

    simulation = evaluated(tmp_path)

    found = simulation.encoded()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(simulation.model.get_parameter(name), value) for name, value in wanted.items())
    assert all(torch.equal(found[name].decode(), value) for name, value in wanted.items())
    assert {str(one.quantizer) for one in found.values()} == {"mxfp4"}


@pytest.mark.filterwarnings("ignore")
def test_gpt_oss_is_checked(tmp_path: Path) -> None:
    gpt_oss(tmp_path)

    run = CliRunner().invoke(main, ["check", str(tmp_path)])

    assert run.exit_code == 0, run.output
    assert "'*.gate_up_proj':\n    weights: mxfp4" in run.output
    assert "4.25 bits per packed weight" in run.output
