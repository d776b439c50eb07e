"""Directories of compressed-tensors, which vLLM and transformers load.

The tensors of a packed layer: codes, `weight_scale` (a factor), `weight_zero_point`, and for NVFP4
`weight_global_scale`, by which block scales are divided. A group of the configuration says how weights and inputs of
its targets are quantized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsim_core.errors import ModelError, RecipeError
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.standard_schemes import AtScale
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_interop.writing.bit_patterns import is_format, nibbles, words
from qsim_interop.writing.layer import Layer
from qsim_interop.writing.source import Source, state_of
from qsim_interop.writing.target import Target, only

NEIGHBOURS = 8
"""Float32 numbers on each side of 1 / global scale that are tried as a divisor."""


class CompressedTensors(Target):
    """Integers of 2 to 8 bits, FP8, NVFP4, MXFP4 and MXFP8."""

    name: ClassVar[str] = "compressed-tensors"
    kinds: ClassVar[tuple[str, ...]] = ("Linear", "experts")
    holds: ClassVar[str] = (
        "integers of 2 to 8 bits and e4m3 by tensor, channel or block(F, n), tiles of e4m3, mxfp4, mxfp8_e4m3, nvfp4"
    )

    def check(self, source: Source) -> list[str]:
        if not hasattr(source.model, "save_pretrained"):
            raise ModelError(f"{type(source.model).__name__} is not a model of transformers, which this format is for")
        notes = []
        for layer in source.layers:
            form, arguments = self._weights(layer)
            self._inputs(layer)
            if form == "nvfp4-pack-quantized":
                self._divisor(layer)
            if arguments["type"] == "int" and layer.scheme.scale is None and form == "pack-quantized":
                notes.append(
                    "scales are float32, and vLLM rounds those of packed integers to the model's dtype: "
                    "scale=bf16 in the recipe gives the same bits there"
                )
            if _global_scale_of(layer.inputs) is not None:
                notes.append(
                    "servers divide the scales of blocks of inputs by the global scale, and the recipe multiplies by "
                    "its inverse: a scale may be the next one of e4m3"
                )
            elif layer.inputs is not None and layer.inputs.plain.element.is_integer and not _is_static(layer.inputs):
                notes.append(
                    "the file does not say what a dynamic scale of integers divides by: vLLM takes the largest "
                    "value, as the recipe does, and compressed-tensors itself half the span, like 127.5"
                )
        return only(notes)

    def write(self, source: Source, directory: Path) -> None:
        model: Any = source.model
        tensors = source.rest()
        for layer in source.layers:
            for name, tensor in self._tensors(layer).items():
                tensors[f"{layer.module}.{name}"] = tensor.contiguous()
        model.save_pretrained(directory, state_dict=tensors)
        for part in state_of(source.loaded):
            part.save_pretrained(directory)
        path = directory / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": self._configuration(source)}
        path.write_text(json.dumps(config, indent=2) + "\n")

    def _configuration(self, source: Source) -> dict[str, Any]:
        """The `quantization_config`: a group for all layers that are alike; targets are names where groups differ."""
        groups: dict[str, dict[str, Any]] = {}
        for layer in source.layers:
            form, weights = self._weights(layer)
            group = {"weights": weights, "input_activations": self._inputs(layer), "format": form}
            groups.setdefault(json.dumps(group), group | {"targets": []})["targets"].append(layer.module)
        if len(groups) == 1:
            next(iter(groups.values()))["targets"] = ["Linear"]
        found = [*dict.fromkeys(group["format"] for group in groups.values())]
        return {
            "quant_method": self.name,
            "format": found[0] if len(found) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": source.plain,
            "kv_cache_scheme": None,
            "config_groups": {f"group_{place}": group for place, group in enumerate(groups.values())},
        }

    def _weights(self, layer: Layer) -> tuple[str, dict[str, Any]]:
        """The format of a layer, and the arguments of its weight. Raises `RecipeError`."""
        element, scheme, block = layer.element, layer.scheme, layer.block
        arguments = {
            "num_bits": element.width,
            "symmetric": scheme.symmetric,
            "dynamic": False,
            **_strategy(scheme, block),
        }
        if element.is_integer:
            if element.width > 8 or (element.min >= 0 and scheme.symmetric):
                raise self.refused(layer)
            if isinstance(scheme.granularity, tuple):
                raise self.refused(layer, "integers have no tiles there")
            whole = element.width == 8 and layer.inputs is not None
            return "int-quantized" if whole else "pack-quantized", {**arguments, "type": "int"}
        arguments["type"] = "float"
        if is_format(element, "e2m1") and layer.is_mx:
            return "mxfp4-pack-quantized", {**arguments, "scale_dtype": "torch.uint8"}
        if layer.is_nvfp4 or layer.divides:
            return "nvfp4-pack-quantized", {
                **arguments,
                "strategy": "tensor_group",
                "scale_dtype": "torch.float8_e4m3fn",
            }
        if is_format(element, "e4m3"):
            form = "mxfp8-quantized" if layer.is_mx else "float-quantized"
            return form, {**arguments, "scale_dtype": "torch.uint8"} if layer.is_mx else arguments
        raise self.refused(layer)

    def _inputs(self, layer: Layer) -> dict[str, Any] | None:
        """The arguments of a layer's inputs; None if they are not quantized. Raises `RecipeError`."""
        quantizer = layer.inputs
        if quantizer is None:
            return None
        if _global_scale_of(quantizer) is not None:
            four = {"num_bits": 4, "type": "float", "symmetric": True, "scale_dtype": "torch.float8_e4m3fn"}
            return {**four, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
        scheme = quantizer.plain
        static, shared = _is_static(quantizer), getattr(scheme, "granularity", None)
        known = (
            isinstance(scheme, Scheme)
            and scheme.scale is None
            and shared in ("token", "tensor")
            and (is_format(scheme.element, "e4m3") or (scheme.element.is_integer and scheme.coded.width == 8))
        )
        if not known or (static and shared != "tensor") or scheme.coded.min >= 0:
            raise RecipeError(
                f"{layer.module}: {self.name} does not hold inputs of {scheme} exactly; it holds e4m3 and int8 by "
                f"token, by tensor and with one static scale, nvfp4_static, or none (activations: none)"
            )
        kind = "int" if scheme.element.is_integer else "float"
        return {"num_bits": 8, "type": kind, "symmetric": scheme.symmetric, "strategy": shared, "dynamic": not static}

    def _tensors(self, layer: Layer) -> dict[str, Tensor]:
        """The stored tensors of a layer by their names in the module."""
        form, _ = self._weights(layer)
        return {**self._codes(layer, form), **dict(self._static(layer.inputs))}

    def _codes(self, layer: Layer, form: str) -> dict[str, Tensor]:
        width = layer.element.width
        if form == "nvfp4-pack-quantized":
            scales = layer.scale_codes.view(torch.float8_e4m3fn)
            return {
                "weight_packed": nibbles(layer.codes),
                "weight_scale": scales,
                "weight_global_scale": self._divisor(layer),
            }
        if form == "mxfp4-pack-quantized":
            return {"weight_packed": nibbles(layer.codes), "weight_scale": layer.scale_codes}
        if form in ("mxfp8-quantized", "float-quantized"):
            scales = layer.scale_codes if form == "mxfp8-quantized" else layer.scales
            return {"weight": layer.codes.view(torch.float8_e4m3fn), "weight_scale": scales}
        zeros = layer.zero_points
        middle = 0 if layer.element.min < 0 else 2 ** (width - 1)
        numbers = (layer.numbers - middle).to(torch.int8)
        if zeros is not None:
            zeros = (zeros - middle).to(torch.int8)
        if form == "int-quantized":
            return {"weight": numbers, "weight_scale": layer.scales} | (
                {} if zeros is None else {"weight_zero_point": zeros}
            )
        packed = {
            "weight_packed": words(_stored(numbers, width), width),
            "weight_scale": layer.scales,
            "weight_shape": torch.tensor(layer.shape),
        }
        if zeros is not None:
            by_rows = zeros.dim() == 2
            packed["weight_zero_point"] = words(_stored(zeros.T, width), width).T if by_rows else zeros
        return packed

    def _static(self, quantizer: Any) -> Iterator[tuple[str, Tensor]]:
        """The static scale of a layer's inputs, and its zero point; of NVFP4 the global scale, which is a divisor."""
        if (scale := _global_scale_of(quantizer)) is not None:
            yield "input_global_scale", _inverse(torch.tensor([scale]))
        if not _is_static(quantizer):
            return
        yield "input_scale", quantizer.scale.detach().reshape(1).float().clone()  # experts share one, files do not
        if quantizer.zero is not None:
            middle = 0 if quantizer.scheme.coded.min < 0 else 128
            yield "input_zero_point", (quantizer.zero.reshape(1) - middle).to(torch.int8, copy=True)

    def _divisor(self, layer: Layer) -> Tensor:
        """A divisor that makes of the block scales what the global scale makes as a factor. Raises `RecipeError`."""
        scale = layer.global_scale
        if layer.divides:
            return scale
        codes = layer.scale_codes.unique().to(torch.uint8)
        factors = codes.view(torch.float8_e4m3fn).float()
        candidates = _near(1 / scale).unsqueeze(-1)
        fits = (factors / candidates == factors * scale).all(-1)
        if not bool(fits.any()):
            raise self.refused(
                layer,
                "it divides by a global scale, and no float32 divisor gives these bits; vllm_nvfp4 divides too, and "
                "with a power of two it is the same: scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))",
            )
        divisors: Tensor = candidates[fits][0]
        return divisors


def _near(number: Tensor) -> Tensor:
    """The float32 numbers [17] around one [1]."""
    return (number.view(torch.int32) + torch.arange(-NEIGHBOURS, NEIGHBOURS + 1, dtype=torch.int32)).view(torch.float32)


def _inverse(scale: Tensor) -> Tensor:
    """A float32 number whose inverse is a scale [1], or 1 / scale if there is none."""
    candidates = _near(1 / scale)
    exact = candidates[1 / candidates == scale]
    return exact[:1].clone() if len(exact) else 1 / scale


def _global_scale_of(quantizer: Any) -> float | None:
    """The given scale of the block scales of inputs in NVFP4; None: it is another quantizer."""
    scheme = getattr(quantizer, "plain", None)
    if not isinstance(scheme, Scheme) or not isinstance(scheme.scale, AtScale) or scheme.granularity != 16:
        return None
    nvfp4 = is_format(scheme.element, "e2m1") and is_format(scheme.scale.rounds_to, "e4m3")
    return scheme.scale.scale if nvfp4 else None


def _strategy(scheme: Scheme, block: int | None) -> dict[str, Any]:
    """The arguments that say which elements share a scale."""
    if isinstance(scheme.granularity, tuple):
        return {"strategy": "block", "block_structure": list(scheme.granularity)}
    if block is not None:
        return {"strategy": "group", "group_size": block}
    return {"strategy": "tensor" if scheme.granularity == "tensor" else "channel"}


def _stored(numbers: Tensor, width: int) -> Tensor:
    """Add half the range, so that the codes of the lowest number are 0."""
    codes: Tensor = (numbers.to(torch.int16) + 2 ** (width - 1)).to(torch.uint8)
    return codes


def _is_static(quantizer: Any) -> bool:
    return isinstance(quantizer, StaticScheme)
