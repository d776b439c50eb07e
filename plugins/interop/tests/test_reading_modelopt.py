"""Checkpoints of ModelOpt: scales are factors, and torchao's tensors hold the same values."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from qsim_interop.reading import open_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from qsim_core.errors import ModelError


def write(directory: Path, tensors: dict[str, Tensor], algorithm: str) -> Path:
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*.left"]}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    save_file(tensors, directory / "model.safetensors")
    return directory


def nvfp4(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randint(0, 256, (16, 32), generator=generator, dtype=torch.uint8),
        "fc.weight_scale": (torch.rand(16, 4, generator=generator) * 448).to(torch.float8_e4m3fn),
        "fc.weight_scale_2": torch.tensor(0.00037),
        "fc.input_scale": torch.tensor(0.004),
    }


def test_nvfp4_is_what_torchao_dequantizes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    stored = nvfp4()

    checkpoint = open_checkpoint(write(tmp_path, stored, "NVFP4"))
    (layer,) = checkpoint.layers
    found = checkpoint.read(layer).dequantize()

    theirs = tensors.NVFP4Tensor(
        stored["fc.weight"], stored["fc.weight_scale"], 16, torch.float32, per_tensor_scale=stored["fc.weight_scale_2"]
    )
    assert (str(layer.weights), str(layer.activations), layer.shape) == ("nvfp4", "nvfp4_static", (16, 64))
    assert checkpoint.input_scales() == {"fc:input.scale": torch.tensor([[0.004]])}
    assert torch.equal(found, theirs.dequantize(torch.float32))


def test_fp8_has_a_scale_of_the_tensor_and_one_of_the_inputs(tmp_path: Path) -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    stored = {"fc.weight": weight, "fc.weight_scale": torch.tensor(0.3), "fc.input_scale": torch.tensor(0.1)}

    checkpoint = open_checkpoint(write(tmp_path, stored, "FP8"))

    assert torch.equal(checkpoint.read(checkpoint.layers[0]).dequantize(), weight.float() * 0.3)
    assert str(checkpoint.layers[0].activations) == "tensor(e4m3, static=true)"
    assert checkpoint.input_scales() == {"fc:input.scale": torch.tensor([[0.1]])}
    assert checkpoint.notes == []
    assert checkpoint.cache()["*:qk"] == {"keys": "at_scale(e4m3, 1.0)"}


def test_the_scales_of_the_cache_lie_with_the_projections(tmp_path: Path) -> None:
    weight = torch.ones(8, 16).to(torch.float8_e4m3fn)
    stored = {
        "a.k_proj.weight": weight,
        "a.k_proj.weight_scale": torch.tensor(0.25),
        "a.k_proj.k_scale": torch.tensor(0.5),
    }

    checkpoint = open_checkpoint(write(tmp_path, stored | {"a.v_proj.v_scale": torch.tensor(2.0)}, "FP8"))

    overrides = checkpoint.recipe.record()["overrides"]
    assert overrides["a:qk"] == {"keys": "at_scale(e4m3, scale=0.5)"}
    assert overrides["a:pv"] == {"values": "at_scale(e4m3, scale=2.0)"}


def test_modules_are_left_out_by_patterns(tmp_path: Path) -> None:
    plain = {f"{name}.weight": torch.ones(4, 4) for name in ("lm_head", "a.left", "a.forgotten")}

    checkpoint = open_checkpoint(write(tmp_path, nvfp4() | plain, "NVFP4"))

    assert checkpoint.left == ["a.forgotten"]


def test_an_algorithm_that_is_not_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="quantized by the algorithm W4A16_AWQ; of modelopt, FP8, NVFP4, "):
        _ = open_checkpoint(write(tmp_path, nvfp4(), "W4A16_AWQ")).layers
