"""`qsim evaluate` on experts in checkpoints of GPTQ, AWQ and ModelOpt, each expert's layers packed by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, build, write
from safetensors.torch import load_file, save_file
from torch import Tensor

import qsim_core as qsim
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.locate import locate
from qsim_core.transforms.forward import call

SIZE = 16
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""The outputs in a word of AWQ's `gemm`, from the low bits on."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Pack = Callable[[int, int, torch.Generator], tuple[dict[str, Tensor], Tensor]]
"""Makes the tensors of a layer of so many rows and columns, and the weight [N, K] that they stand for."""


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes of each row side by side in words of 32 bits, the lowest bits first."""
    places = torch.arange(0, 32, bits)
    whole = (codes.long().unflatten(-1, (-1, 32 // bits)) << places).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


def gptq(bits: int = 4, less: int = 1, symmetric: bool = False, act_order: bool = False) -> Pack:
    def pack(rows: int, columns: int, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        groups = columns // SIZE
        codes = torch.randint(2**bits, (rows, columns), generator=random)
        zeros = torch.randint(1, 2**bits, (groups, rows), generator=random)
        zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
        scales = (torch.rand(groups, rows, generator=random) / 2**bits + 0.001).half()
        index = torch.arange(columns) // SIZE
        index = index[torch.randperm(columns, generator=random)] if act_order else index
        parts = {"qweight": words(codes, bits).T, "qzeros": words(zeros - less, bits), "scales": scales}
        wanted = (codes - zeros.T[:, index]).float() * scales.T.float()[:, index]
        return parts | {"g_idx": index.int()}, wanted

    return pack


def awq(layout: str) -> Pack:
    def pack(rows: int, columns: int, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        groups, index = columns // SIZE, torch.arange(columns) // SIZE
        codes = torch.randint(16, (rows, columns), generator=random)
        zeros = torch.randint(16, (rows, groups), generator=random)
        scales = (torch.rand(rows, groups, generator=random) / 16 + 0.001).half()
        wanted = (codes - zeros[:, index]).float() * scales.float()[:, index]
        if layout == "gemv":  # rows of scales are filled up to 64
            more = (0, 64 - groups)
            filled, scales = torch.nn.functional.pad(zeros, more), torch.nn.functional.pad(scales, more)
            return {"qweight": words(codes, 4), "qzeros": words(filled, 4), "scales": scales}, wanted
        outputs = {name: of.T.unflatten(-1, (-1, 8)) for name, of in (("qweight", codes), ("qzeros", zeros))}
        parts = {name: words(of[..., ORDER].flatten(-2), 4) for name, of in outputs.items()}
        return parts | {"scales": scales.T}, wanted

    return pack


def modelopt_fp8(rows: int, columns: int, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randn(rows, columns, generator=random).to(torch.float8_e4m3fn)
    scale, of_inputs = torch.rand(2, generator=random) + 0.01
    return {"weight": codes, "weight_scale": scale, "input_scale": of_inputs}, codes.float() * scale


def modelopt_nvfp4(rows: int, columns: int, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randint(16, (rows, columns), generator=random, dtype=torch.uint8)
    scales = (torch.rand(rows, columns // 16, generator=random) * 448).to(torch.float8_e4m3fn)
    whole, of_inputs = torch.rand(2, generator=random) / 1000 + 1e-5
    parts = {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scales, "weight_scale_2": whole}
    wanted = E2M1[codes.long()] * (scales.float() * whole).repeat_interleave(16, 1)
    return parts | {"input_scale": of_inputs}, wanted


def packed(family: str, pack: Pack, method: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Write a checkpoint of which all projections are packed, and give their weights by the names that it has."""
    write(build(family), folder)
    tensors, wanted, random = load_file(folder / "model.safetensors"), {}, torch.Generator().manual_seed(0)
    for name in [name for name in tensors if ".experts." in name or "_proj." in name]:
        rows, columns = tensors.pop(name).shape
        parts, wanted[name] = pack(rows, columns, random)
        tensors |= {f"{name.removesuffix('weight')}{last}": part.contiguous().clone() for last, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": method}))
    return wanted


def evaluated(family: str, folder: Path) -> tuple[qsim.Simulation, Job]:
    """The simulation that `qsim evaluate` makes of a directory."""
    located = locate(str(folder), qsim.Host())
    job = Job.at(located, qsim.Recipe(), qsim.Host())
    loaded = located.adapter.load(located.source, torch.float32)
    example = FAMILIES[family].example
    return qsim.simulate(loaded.model, job.recipe, example=example, final=loaded.final, state=job.state()), job


def reference(family: str, weights: dict[str, Tensor], job: Job) -> qsim.Simulation:
    """The simulation of a plain model with these weights, of which the inputs alone are quantized."""
    model = build(family)
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []
    said = job.recipe.record()["overrides"]
    inputs = {name: {"activations": one["activations"]} for name, one in said.items() if "activations" in one}
    recipe = qsim.Recipe.of({"overrides": inputs})
    return qsim.simulate(model, recipe, example=FAMILIES[family].example, state=job.state())


def stacked(wanted: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The weights under the names of transformers: those of experts in stacks, gate above up."""
    block, (gate, up, down) = {
        "Mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
        "Qwen3-MoE": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    }[family]
    found = {name: weight for name, weight in wanted.items() if ".experts." not in name}
    for layer in range(2):
        of = f"model.layers.{layer}.{block}.experts"
        one = [{end: wanted[f"{of}.{n}.{end}.weight"] for end in (gate, up, down)} for n in range(4)]
        stack = f"model.layers.{layer}.mlp.experts"
        found[f"{stack}.gate_up_proj"] = torch.stack([torch.cat([each[gate], each[up]]) for each in one])
        found[f"{stack}.down_proj"] = torch.stack([each[down] for each in one])
    return found


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": SIZE, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True, "modules_to_not_convert": ["gate"]}
MODELOPT = {"quant_method": "modelopt", "ignore": ["lm_head", "*.gate"]}


@pytest.mark.parametrize(
    ("family", "pack", "method"),
    [
        pytest.param("Mixtral", gptq(), GPTQ, id="gptq"),
        pytest.param("Qwen3-MoE", gptq(symmetric=True), GPTQ | {"sym": True}, id="gptq-symmetric"),
        pytest.param("Mixtral", gptq(8, less=0), GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, id="gptq_v2"),
        pytest.param("Qwen3-MoE", gptq(act_order=True), GPTQ | {"desc_act": True}, id="gptq-act-order"),
        pytest.param("Mixtral", awq("gemm"), AWQ | {"version": "gemm"}, id="awq-gemm"),
        pytest.param("Qwen3-MoE", awq("gemv"), AWQ | {"version": "gemv"}, id="awq-gemv"),
        pytest.param("Mixtral", modelopt_fp8, MODELOPT | {"quant_algo": "FP8"}, id="modelopt-fp8"),
        pytest.param("Qwen3-MoE", modelopt_nvfp4, MODELOPT | {"quant_algo": "NVFP4"}, id="modelopt-nvfp4"),
    ],
)
def test_the_weights_of_experts_are_those_of_the_checkpoint_and_are_not_rounded_again(
    family: str, pack: Pack, method: dict[str, Any], tmp_path: Path
) -> None:
    wanted = stacked(packed(family, pack, method, tmp_path), family)

    simulation, job = evaluated(family, tmp_path)

    example = FAMILIES[family].example
    assert all(torch.equal(simulation.model.get_parameter(name), weight) for name, weight in wanted.items())
    assert torch.equal(call(simulation.model, example)[0], call(reference(family, wanted, job).model, example)[0])


@pytest.mark.parametrize(("pack", "algorithm"), [(modelopt_fp8, "FP8"), (modelopt_nvfp4, "NVFP4")])
def test_modelopts_experts_have_the_largest_scale_of_their_inputs(pack: Pack, algorithm: str, tmp_path: Path) -> None:
    packed("Mixtral", pack, MODELOPT | {"quant_algo": algorithm}, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    experts = "model.layers.1.block_sparse_moe.experts"
    scales = [tensors[f"{experts}.{n}.{end}.input_scale"] for n in range(4) for end in ("w1", "w3")]

    stored = locate(str(tmp_path), qsim.Host()).stored

    assert stored is not None
    assert float(stored.state["model.layers.1.mlp.experts.gate_up_proj:input.scale"]) == float(max(scales))
