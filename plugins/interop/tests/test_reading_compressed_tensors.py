"""Checkpoints of compressed-tensors: each weight is the one that the library itself decompresses, to the bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from qsim_interop.reading import open_checkpoint
from safetensors.torch import save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

FORMATS = {
    "W4A16": ("pack-quantized", "block(int(4, narrow=false, convention=gptq), n=128)", None),
    "W4A16_ASYM": ("pack-quantized", "block(int4, n=128, symmetric=false)", None),
    "W3A16": ("pack-quantized", "block(int(3, narrow=false, convention=gptq), n=128)", None),
    "W8A8": (
        "int-quantized",
        "channel(int(8, narrow=false, convention=gptq))",
        "token(int(8, narrow=false, convention=gptq))",
    ),
    "FP8_DYNAMIC": ("float-quantized", "channel(e4m3)", "token(e4m3)"),
    "FP8": ("float-quantized", "tensor(e4m3)", "tensor(e4m3, static=true)"),
    "FP8_BLOCK": ("float-quantized", "block(e4m3, n=[128, 128])", "block(e4m3, n=128)"),
    "NVFP4": ("nvfp4-pack-quantized", "nvfp4", "scaled(e2m1, block=16, scale=scaled(e4m3, static=true))"),
    "MXFP4": ("mxfp4-pack-quantized", "mxfp4", "mxfp4"),
    "MXFP8": ("mxfp8-quantized", "mxfp8_e4m3", "mxfp8_e4m3"),
}
"""A preset of the library -> its format, and the quantizers of weights and inputs that it stands for."""


def blocks(x: torch.Tensor, scheme: QuantizationScheme) -> torch.Tensor:
    """The values that share a scale, along the last axis."""
    args = scheme.weights
    if args.strategy == "tensor":
        return x.flatten()
    if args.strategy == "channel":
        return x.unsqueeze(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        return x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).movedim(1, 2).flatten(-2)
    return x.unflatten(1, (-1, args.group_size))


def compressed(x: torch.Tensor, preset: str) -> tuple[dict[str, torch.Tensor], QuantizationScheme, Any]:
    """A weight as the library stores it, with the scheme and the compressor."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    state = {"weight": x}
    low, high = blocks(x, scheme).aminmax(dim=-1)
    given = {"global_scale": generate_gparam(x.min(), x.max())} if scheme.weights.strategy == "tensor_group" else {}
    state["weight_scale"], zero = calculate_qparams(low, high, scheme.weights, **given)
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = zero
    if given:
        state["weight_global_scale"] = given["global_scale"]
    if preset == "NVFP4":
        state["input_global_scale"] = torch.tensor([100.0])
    if preset == "FP8":
        state["input_scale"] = torch.tensor([0.5])
    compressor = compressors.BaseCompressor.get_value_from_registry(FORMATS[preset][0])
    return compressor.compress(state, scheme), scheme, compressor


def decompressed(state: dict[str, torch.Tensor], scheme: QuantizationScheme, compressor: Any) -> torch.Tensor:
    """The weight in float32; the library's own method would unpack four-bit floats to bfloat16."""
    if scheme.weights.num_bits != 4 or scheme.weights.type != "float":
        found: torch.Tensor = compressor.decompress(state, scheme)["weight"]
        return found
    packed = state["weight_packed"]
    units = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
    scale = compressor._decompress_scale(state["weight_scale"], torch.float32)
    by: torch.Tensor = dequantize(
        units, scale, args=scheme.weights, global_scale=state.get("weight_global_scale"), dtype=torch.float32
    )
    return by


def write(
    directory: Path, tensors: dict[str, torch.Tensor], scheme: QuantizationScheme, form: str, **more: Any
) -> Path:
    """A checkpoint with one group of layers."""
    config = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], **more}
    config["config_groups"] = {"group_0": scheme.model_dump(mode="json")}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("preset", FORMATS)
def test_a_weight_is_the_one_that_the_library_decompresses(preset: str, tmp_path: Path) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    form, weights, activations = FORMATS[preset]
    state, scheme, compressor = compressed(x, preset)
    write(tmp_path, {f"fc.{name}": tensor for name, tensor in state.items()}, scheme, form)

    checkpoint = open_checkpoint(tmp_path)
    (layer,) = checkpoint.layers
    found = checkpoint.read(layer).dequantize()

    expected = decompressed(state, scheme, compressor)
    assert (str(layer.weights), layer.activations and str(layer.activations)) == (weights, activations)
    assert torch.equal(found, expected)


def test_the_global_scale_of_inputs_is_the_inverse_of_the_stored_one(tmp_path: Path) -> None:
    state, scheme, _ = compressed(torch.ones(32, 32), "NVFP4")
    write(tmp_path, {f"fc.{name}": tensor for name, tensor in state.items()}, scheme, "nvfp4-pack-quantized")

    assert open_checkpoint(tmp_path).input_scales() == {"fc:input.scale": torch.tensor([[1 / 100]])}
