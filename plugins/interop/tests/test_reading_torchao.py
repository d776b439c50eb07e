"""Checkpoints of torchao that transformers wrote: each weight is the one that torchao dequantizes, to the bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from qsim_interop.reading import open_checkpoint
from safetensors.torch import save_file

from qsim_core.errors import ModelError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ao = pytest.importorskip("torchao.quantization")
    from torchao.prototype import mx_formats
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization.quantize_.common import KernelPreference


def mx(dtype: torch.dtype) -> Any:
    """MX weights and inputs, with the default rule of torchao's scales."""
    return mx_formats.MXDynamicActivationMXWeightConfig(
        activation_dtype=dtype, weight_dtype=dtype, kernel_preference=KernelPreference.EMULATED
    )


CONFIGS = {
    "channel(int(8, narrow=false, convention=gptq))": (ao.Int8WeightOnlyConfig(), None),
    "block(int(4, narrow=false, convention=gptq), n=32)": (
        ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)), None,
    ),
    "block(int3, n=32, symmetric=false)": (
        ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int3, weight_granularity=ao.PerGroup(32), weight_mapping_type=ao.MappingType.ASYMMETRIC
        ),
        "token(int8, symmetric=false)",
    ),
    "channel(e4m3)": (ao.Float8WeightOnlyConfig(), None),
    "nvfp4": (mx_formats.NVFP4WeightOnlyConfig(), None),
    "mxfp4": (mx(torch.float4_e2m1fn_x2), "block(e2m1, n=32, scale=e8m0, rule=rceil)"),
    "mxfp8_e4m3": (mx(torch.float8_e4m3fn), "block(e4m3, n=32, scale=e8m0, rule=rceil)"),
}  # fmt: skip
"""The quantizer of the weights -> a configuration of torchao, and the quantizer of the inputs."""


def write(directory: Path, config: Any) -> torch.nn.Linear:
    """A layer that torchao quantized, written as transformers does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 160))
    if isinstance(config, mx_formats.MXDynamicActivationMXWeightConfig):
        model.bfloat16()  # the library takes no other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao.quantize_(model, config)
        tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, directory / "model.safetensors", metadata)
    said = {"quant_method": "torchao", "quant_type": {"default": {"_type": type(config).__name__}}}
    (directory / "config.json").write_text(json.dumps({"quantization_config": said}))
    layer: torch.nn.Linear = model[0]
    return layer


@pytest.mark.parametrize("text", CONFIGS)
def test_a_weight_is_the_one_that_torchao_dequantizes(text: str, tmp_path: Path) -> None:
    config, inputs = CONFIGS[text]
    module = write(tmp_path, config)

    checkpoint = open_checkpoint(tmp_path)
    (layer,) = checkpoint.layers

    assert (str(layer.weights), layer.activations and str(layer.activations)) == (text, inputs)
    theirs = module.weight.dequantize()
    assert torch.equal(checkpoint.read(layer).dequantize(), theirs.float())


@pytest.mark.parametrize("text", ["block(int3, n=32, symmetric=false)", "channel(e4m3)", "nvfp4", "mxfp4"])
def test_a_pickle_is_read_without_running_it(text: str, tmp_path: Path) -> None:
    config, inputs = CONFIGS[text]
    module = write(tmp_path, config)
    torch.save({"0.weight": module.weight, "0.bias": module.bias.data}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()

    checkpoint = open_checkpoint(tmp_path)
    (layer,) = checkpoint.layers

    assert (str(layer.weights), layer.activations and str(layer.activations)) == (text, inputs)
    assert torch.equal(checkpoint.read(layer).dequantize(), module.weight.dequantize().float())


def test_a_pickle_with_other_objects_is_refused(tmp_path: Path) -> None:
    write(tmp_path, ao.Int8WeightOnlyConfig())
    (tmp_path / "model.safetensors").unlink()
    torch.save({"0.weight": Path("/")}, tmp_path / "pytorch_model.bin")

    with pytest.raises(
        ModelError,
        match=r"^[^\n]*pytorch_model.bin is corrupt, or a pickle with more than tensors of torch and torchao",
    ):
        open_checkpoint(tmp_path)


def test_inputs_in_int8_are_read(tmp_path: Path) -> None:
    write(tmp_path, ao.Int8DynamicActivationInt8WeightConfig())

    (layer,) = open_checkpoint(tmp_path).layers

    assert str(layer.activations) == "token(int(8, narrow=false, convention=gptq))"


def test_a_class_that_is_not_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, ao.Int8WeightOnlyConfig())
    said = {"_type": "Int4Tensor", "_data": {}, "_tensor_data_names": ["qdata", "scale"]}
    save_file(
        {"0._weight_qdata": torch.zeros(4, 4, dtype=torch.int8)},
        tmp_path / "model.safetensors",
        {"0.weight": json.dumps(said)},
    )

    with pytest.raises(
        ModelError,
        match="0 is of class Int4Tensor; of torchao, Int8Tensor, IntxUnpackedToInt8Tensor, Float8.*"
        "dequantizes no Int4Tensor",
    ):
        _ = open_checkpoint(tmp_path).layers


@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.float8_e4m3fn])
def test_inputs_in_mx_are_the_bits_of_torchao(dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path, mx(dtype))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]

    (layer,) = open_checkpoint(tmp_path).layers

    assert layer.activations is not None
    rule = ScaleCalculationMode.RCEIL
    theirs = MXTensor.to_mx(x, dtype, 32, rule, KernelPreference.EMULATED).dequantize()
    assert torch.equal(layer.activations.quantize(x), theirs)
