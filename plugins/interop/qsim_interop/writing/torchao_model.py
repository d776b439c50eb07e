"""Directories of transformers whose weights are tensor classes of torchao, taken apart into safetensors.

`from_pretrained` makes the tensors again from the metadata of the file. Their `dequantize` multiplies as the
simulation does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsim_core.components.host import installed
from qsim_core.errors import ModelError, RecipeError
from qsim_interop.writing.bit_patterns import is_format, nibbles
from qsim_interop.writing.layer import Layer
from qsim_interop.writing.source import Source, state_of
from qsim_interop.writing.target import Target


class TorchAO(Target):
    """Integers of 2 to 8 bits, E4M3, NVFP4, and MX with MX inputs."""

    name: ClassVar[str] = "torchao"
    library: ClassVar[str | None] = "torchao"
    holds: ClassVar[str] = (
        "integers of 2 to 8 bits by tensor, channel, block(F, n) or tiles, e4m3 by tensor or channel, nvfp4, and "
        "mxfp4 or mxfp8_e4m3 with inputs in one of these"
    )

    def check(self, source: Source) -> list[str]:
        if not hasattr(source.model, "save_pretrained"):
            raise ModelError(f"{type(source.model).__name__} is not a model of transformers, which this format is for")
        for layer in source.layers:
            self._check_weight(layer)
            if _holds_mx(layer) and _mx_of(layer.inputs) is None:
                raise RecipeError(
                    f"{layer.module}: torchao multiplies {layer.weight.quantizer} by inputs in MX only; say "
                    f"activations: mxfp4 or mxfp8_e4m3, and none at attention's products"
                )
            if layer.inputs is not None and not _holds_mx(layer):
                raise RecipeError(
                    f"{layer.module}: torchao is written with weights only, but for MX; leave activations out"
                )
        return []

    def write(self, source: Source, directory: Path) -> None:
        from safetensors.torch import save_file
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        model: Any = source.model
        seen: set[int] = set()
        tensors: dict[str, Any] = {}
        for name, tensor in source.rest().items():
            if tensor.data_ptr() not in seen:  # transformers ties the other one again
                tensors[name] = tensor.contiguous()
            seen.add(tensor.data_ptr())
        tensors |= {layer.weight.name: _tensor(layer) for layer in source.layers}
        flat, metadata = flatten_tensor_state_dict(tensors)
        save_file(flat, directory / "model.safetensors", metadata={**metadata, "format": "pt"})
        model.config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
        for part in state_of(source.loaded):
            part.save_pretrained(directory)
        path = directory / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": _configuration(source)}
        path.write_text(json.dumps(config, indent=2) + "\n")

    def _check_weight(self, layer: Layer) -> None:
        """Raise `RecipeError` unless a tensor class holds the weight."""
        element, shared = layer.element, layer.scheme.granularity
        if element.is_integer and element.width <= 8 and (element.min < 0 or not layer.scheme.symmetric):
            if isinstance(shared, tuple) and any(side % part for side, part in zip(layer.shape, shared, strict=True)):
                raise self.refused(layer, f"tiles of {list(shared)} do not divide its weight {list(layer.shape)}")
            _ = layer.block
        elif (
            not layer.is_nvfp4
            and not _holds_mx(layer)
            and not (is_format(element, "e4m3") and shared in ("tensor", "channel"))
        ):
            raise self.refused(layer)


def _holds_mx(layer: Layer) -> bool:
    return layer.is_mx and (is_format(layer.element, "e2m1") or is_format(layer.element, "e4m3"))


def _mx_of(quantizer: Any) -> torch.dtype | None:
    """torchao's dtype of a quantizer of inputs in MX, with scales as OCP has them; None: it is another quantizer."""
    known = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8_e4m3": torch.float8_e4m3fn}
    return next((dtype for name, dtype in known.items() if quantizer == installed().parse(name)), None)


def _block_size(layer: Layer) -> list[int]:
    """The rows and columns that share a scale."""
    (rows, columns), shared = layer.shape, layer.scheme.granularity
    if isinstance(shared, tuple):
        return list(shared)
    return [rows if shared == "tensor" else 1, layer.block or columns]


def _tensor(layer: Layer) -> Tensor:
    """A weight in the tensor class of torchao that holds it."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import Float8Tensor, IntxUnpackedToInt8Tensor

    if layer.is_nvfp4:
        scale = layer.scale_codes.view(torch.float8_e4m3fn)
        four: Tensor = NVFP4Tensor(nibbles(layer.codes), scale, 16, torch.float32, layer.global_scale.reshape(()))
        return four
    if _holds_mx(layer):
        return _mx_tensor(layer)
    size = _block_size(layer)
    scale = layer.scales.reshape(layer.shape[0] // size[0], layer.shape[1] // size[1])
    if not layer.element.is_integer:
        codes = layer.codes.view(torch.float8_e4m3fn)
        packed: Tensor = Float8Tensor(codes, scale, block_size=size, dtype=torch.float32)
        return packed
    width = layer.element.width
    middle = 0 if layer.element.min < 0 else 2 ** (width - 1)
    zeros = layer.zero_points
    zero = torch.zeros_like(scale) if zeros is None else zeros.reshape(scale.shape) - middle
    kind = getattr(torch, f"int{width}")
    numbers = (layer.numbers - middle).to(torch.int8)
    held: Tensor = IntxUnpackedToInt8Tensor(numbers, scale, zero.to(torch.int8), kind, tuple(size), torch.float32, None)
    return held


def _mx_tensor(layer: Layer) -> Tensor:
    """A weight in MX, whose inputs are quantized in each forward; products are computed on any device."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.quantization.quantize_.common import KernelPreference

    four, emulated = is_format(layer.element, "e2m1"), KernelPreference.EMULATED
    codes = nibbles(layer.codes) if four else layer.codes.view(torch.float8_e4m3fn)
    kind = torch.float4_e2m1fn_x2 if four else torch.float8_e4m3fn
    inputs = QuantizeTensorToMXKwargs(
        elem_dtype=_mx_of(layer.inputs), block_size=32, kernel_preference=emulated, is_swizzled_scales=False
    )
    scale = layer.scale_codes.view(torch.float8_e8m0fnu)
    held: Tensor = MXTensor(codes, scale, kind, 32, torch.float32, emulated, inputs, False)
    return held


def _configuration(source: Source) -> dict[str, Any]:
    """The `quantization_config`, after the first layer; each tensor of the file says its own."""
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
    from torchao.quantization import Float8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
    from transformers import TorchAoConfig

    layer = source.layers[0]
    if layer.element.is_integer:
        granularity = PerAxis(0) if layer.block is None else PerGroup(layer.block)
        kind: Any = IntxWeightOnlyConfig(getattr(torch, f"int{layer.element.width}"), granularity)
    elif _holds_mx(layer):
        kind = MXDynamicActivationMXWeightConfig()
    else:
        kind = NVFP4WeightOnlyConfig() if layer.is_nvfp4 else Float8WeightOnlyConfig()
    described: dict[str, Any] = TorchAoConfig(kind, modules_to_not_convert=source.plain).to_dict()
    return described
