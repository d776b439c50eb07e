"""`qsim check` says what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from qsim_core.cli.main import main

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
K, N = 64, 16


def nvfp4(module: str, by: float = 100.0) -> dict[str, torch.Tensor]:
    return {
        f"{module}.weight_packed": torch.full((N, K // 2), 0x21, dtype=torch.uint8),
        f"{module}.weight_scale": torch.ones(N, K // 16).to(torch.float8_e4m3fn),
        f"{module}.weight_global_scale": torch.tensor([by]),
    }


def int4(module: str, columns: int = K) -> dict[str, torch.Tensor]:
    return {
        f"{module}.weight_packed": torch.full((N, columns // 8), 0x77777777, dtype=torch.int32),
        f"{module}.weight_scale": torch.ones(N, columns // 32).bfloat16(),
        f"{module}.weight_shape": torch.tensor([N, columns]),
    }


def write(directory: Path, tensors: dict[str, torch.Tensor], weights: dict[str, Any], **more: Any) -> Path:
    config = {"quant_method": "compressed-tensors", "format": "packed", "ignore": ["lm_head"], **more}
    config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file(tensors, directory / "model.safetensors")
    return directory


def check(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def test_a_sound_checkpoint_is_told_as_a_recipe(tmp_path: Path) -> None:
    tensors = int4("model.layers.0.q_proj") | int4("model.layers.1.q_proj") | {"lm_head.weight": torch.ones(N, K)}

    run = check(write(tmp_path, tensors, INT4))

    assert run.exit_code == 0, run.output
    assert "'*.q_proj':\n    weights: block(int(4, narrow=false, convention=gptq), n=32, scale=bf16)" in run.output
    assert "4.5 bits per packed weight" in run.output
    assert "not packed: lm_head" in run.output
    assert run.output.endswith("nothing found wrong\n")


def test_layers_that_are_packed_in_another_way_are_named_one_by_one(tmp_path: Path) -> None:
    tensors = int4("a.0.fc") | int4("a.1.fc") | {"a.2.fc.weight": torch.ones(N, K)}

    run = check(write(tmp_path, tensors, INT4, ignore=["a.2.fc"]), "--json")

    assert list(json.loads(run.output)["recipe"]["overrides"]) == ["a.0.fc", "a.1.fc"]


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"a.q_proj.weight_global_scale": None}, "a.q_proj", "lacks weight_global_scale"),
        ({"a.q_proj.weight_global_scale": torch.tensor([0.0])}, "a.q_proj",
         "1 of 1 values of weight_global_scale are zero"),
        ({"a.q_proj.weight_scale": torch.full((N, 4), torch.nan).to(torch.float8_e4m3fn)}, "a.q_proj",
         "64 of 64 values of weight_scale are not finite"),
        ({"a.q_proj.weight_scale": torch.ones(N, 5).to(torch.float8_e4m3fn)}, "a.q_proj",
         "weight_scale has shape [16, 5], and a weight of [16, 64] needs [16, 4]"),
        (nvfp4("a.k_proj", by=250.0), "a", "the global scales of q_proj, k_proj differ by up to a factor of 2.5; "
         "servers fuse these layers and use one"),
        ({"a.o_proj.weight": torch.ones(N, K)}, "a.o_proj",
         "is not packed (F32), and the configuration targets it"),
        (nvfp4("lm_head"), "lm_head", "is packed, and the configuration leaves it out"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(change: dict[str, torch.Tensor | None], where: str, what: str, tmp_path: Path) -> None:
    tensors = nvfp4("a.q_proj") | change

    run = check(write(tmp_path, {n: t for n, t in tensors.items() if t is not None}, NVFP4), "--json")

    assert run.exit_code == 1
    assert json.loads(run.output)["findings"] == [{"where": where, "what": what}]


def test_groups_that_do_not_divide_the_inputs_are_found(tmp_path: Path) -> None:
    run = check(write(tmp_path, int4("fc", columns=80), INT4))

    assert "Finding: fc: its groups of 32 do not divide K = 80\n" in run.output


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    write(tmp_path, int4("a.fc"), INT4)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    places = {**dict.fromkeys(int4("a.fc"), "model-1.safetensors"), "b.fc.weight_packed": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    run = check(tmp_path)

    assert run.exit_code == 1
    assert "Finding: model-2.safetensors: is missing, with b.fc.weight_packed\n" in run.output


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "is quantized by 'bitsandbytes', which is not read. There are: "),
        ({}, "is not quantized: its config.json has no quantization_config"),
        ({"quant_method": "compressed-tensors"}, "fc is packed, and no group of the configuration targets it"),
    ],
)
def test_what_cannot_be_read_is_one_line(config: dict[str, str], message: str, tmp_path: Path) -> None:
    save_file(int4("fc"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))

    run = check(tmp_path)

    assert run.exit_code == 1
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "torchao", "quant_type": "int8"}, "its quantization_config cannot be read: "),
        ({"quant_method": "fp8"}, "says that it is quantized, as fp8, and none of its weights is; take "),
        ({"quant_method": "compressed-tensors"}, "says that it is quantized, as compressed-tensors (None), and none "),
    ],
)
def test_a_wrong_configuration_of_plain_weights_is_one_line(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_file({"a.q_proj.weight": torch.ones(N, K)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))

    run = check(tmp_path)

    assert run.exit_code == 1
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_path_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert check(tmp_path / "no").stderr == f"Error: {tmp_path}/no does not exist\n"


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"format": "dense", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
)
def test_a_format_that_is_not_read_is_named(config: dict[str, Any], form: str, tmp_path: Path) -> None:
    run = check(write(tmp_path, int4("fc"), INT4, **config))

    assert run.stderr.startswith(f"Error: {tmp_path} has the format '{form}', which is not read: its codes are ")
    assert run.stderr.count("\n") == 1


def test_a_truncated_shard_is_one_line(tmp_path: Path) -> None:
    file = write(tmp_path, int4("fc"), INT4) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    run = check(tmp_path)

    assert run.stderr.startswith(f"Error: {file} is not a safetensors file, or is corrupt: ")
    assert run.stderr.count("\n") == 1


def test_a_directory_of_links_is_read(tmp_path: Path) -> None:
    for name in ("stored", "linked"):
        (tmp_path / name).mkdir()
    for path in write(tmp_path / "stored", int4("a.fc"), INT4).iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)

    run = check(tmp_path / "linked")

    assert run.exit_code == 0, run.output
