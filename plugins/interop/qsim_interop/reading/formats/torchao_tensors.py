"""Checkpoints of torchao, as transformers writes them in safetensors files.

The metadata of a file say for each weight which class of tensor it was, and its stored parts are `_weight_qdata`,
`_weight_scale` and `_weight_zero_point`. A symmetric scale maps the largest magnitude to half the span of the codes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsim_core.errors import ModelError
from qsim_core.formats.quantizer import Quantizer
from qsim_interop.reading.formats.bit_fields import from_nibbles
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part, shape_of_scales
from qsim_interop.reading.reader import USUALLY_LEFT, Reader, is_inside
from qsim_interop.reading.tensors import SCALE_FORMATS

CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "MXTensor", "NVFP4Tensor")
"""The classes of tensors that are read."""
PARTS = {
    "qdata": "codes",
    "scale": "scales",
    "zero_point": "zero_points",
    "per_tensor_scale": "global_scale",
    "act_per_tensor_scale": "input_global_scale",
}
"""The stored parts of such a tensor, and their roles."""
FLOATS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
"""The dtypes of the codes of floats, and their formats."""
MX = {"float4_e2m1fn_x2": "e2m1", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
"""The dtypes of elements in MX, and their formats."""
RULES = {"FLOOR": "floor", "CEIL": "ceil", "EVEN": "even", "RCEIL": "rceil"}
"""The ways of torchao to find the scale of inputs in MX, and the rules of schemes that they are."""


class TorchAO(Reader):
    """Integers of up to 8 bits, a code in each byte, FP8, MX and NVFP4."""

    method: ClassVar[str] = "torchao"

    @property
    def kind(self) -> str:
        default = (self.config.get("quant_type") or {}).get("default") or {}
        return f"{self.method} ({default.get('_type')})"

    def targets(self, module: str) -> bool:
        if module in self.packed:
            return True
        everywhere = "WeightConfig" in self.kind or "WeightOnlyConfig" in self.kind
        left = self.config.get("modules_to_not_convert") or ()
        return everywhere and not is_inside(module, left) and not USUALLY_LEFT.search(module)

    def _layers(self) -> Iterator[Layer]:
        for name, text in self.tensors.metadata.items():
            module, _, last = name.rpartition(".")
            said = json.loads(text) if last == "weight" else {}
            if said.get("_type") not in (None, "Tensor"):
                yield self._layer(module, said)

    def _layer(self, module: str, said: Mapping[str, Any]) -> Layer:
        kind, data, names = said["_type"], said["_data"], said["_tensor_data_names"]
        codes = f"{module}._weight_qdata"
        if kind not in CLASSES or not PARTS.keys() >= set(names) or codes not in self.tensors:
            beside = "".join(f" with {name}" for name in names if name not in PARTS)
            raise ModelError(
                f"{self.path}: {module} is of class {kind}{beside}; of torchao, {', '.join(CLASSES)} are read"
                + (", and torchao itself dequantizes no Int4Tensor" if kind.startswith("Int4") else "")
            )
        if kind in ("MXTensor", "NVFP4Tensor"):
            return self._layer_of_blocks(module, said)
        stored = self.tensors[codes]
        shape, (rows, columns) = (stored.shape[0], stored.shape[1]), data["block_size"]
        scale = self.tensors.get(f"{module}._weight_scale")
        form = SCALE_FORMATS.get("" if scale is None else scale.dtype, "")
        zero = f"{module}._weight_zero_point"
        symmetric = zero not in self.tensors or not bool(self.tensors.read(zero).any())
        element = FLOATS.get(stored.dtype) or _integer(data, symmetric)
        more = ("" if symmetric else ", symmetric=false") + (f", scale={form}" if form else "")
        if (rows, columns) == shape:
            text = f"tensor({element}{more})"
        elif (rows, columns) == (1, shape[1]):
            text = f"channel({element}{more})"
        else:
            text = f"block({element}, {columns if rows == 1 else [rows, columns]}{more})"
        weights = self.scheme(text)
        parts = {
            PARTS[name]: Part(f"{module}._weight_{name}", shape if name == "qdata" else shape_of_scales(weights, shape))
            for name in names
        }
        return Layer(module, shape, weights, self._inputs(module, data), parts)

    def _layer_of_blocks(self, module: str, said: Mapping[str, Any]) -> Layer:
        """A layer in MX or NVFP4. Raises `ModelError` for inputs that are not read."""
        data, names, four = said["_data"], said["_tensor_data_names"], said["_type"] == "NVFP4Tensor"
        rows, columns = self.tensors[f"{module}._weight_qdata"].shape
        element = "e2m1" if four else MX[data["elem_dtype"]["_data"]]
        shape = (rows, 2 * columns if element == "e2m1" else columns)
        if four:
            text = "nvfp4" if "per_tensor_scale" in names else "block(e2m1, 16, scale=e4m3)"
        else:
            text = _mx(element, data["block_size"], "floor")
        weights = self.scheme(text)
        needed = {"qdata": (rows, columns), "scale": shape_of_scales(weights, shape)}
        if data["is_swizzled_scales"]:
            scale = self.tensors.get(f"{module}._weight_scale")
            filled = math.prod(_filled(needed["scale"]))
            if scale is not None and math.prod(scale.shape) == filled:
                needed["scale"] = (scale.shape[0], scale.shape[1])
        parts = {PARTS[name]: Part(f"{module}._weight_{name}", needed.get(name, ())) for name in names}
        given = data.get("act_quant_kwargs")
        options = (given or {}).get("_data") or {}
        if given is None:
            inputs = None
        elif four and "act_per_tensor_scale" in names:
            inputs = self.quantizer("nvfp4_static")
        elif four and options.get("use_dynamic_per_tensor_scale"):
            inputs = self.quantizer("nvfp4")
        elif not four and options["scaling_mode"]["_data"] in RULES:
            rule = RULES[options["scaling_mode"]["_data"]]
            inputs = self.quantizer(_mx(MX[options["elem_dtype"]["_data"]], options["block_size"], rule))
        else:
            raise ModelError(f"{self.path}: {module} quantizes its inputs in a way that is not read: {options}")
        return Layer(module, shape, weights, inputs, parts)

    def scales(self, layer: Layer) -> dict[str, Tensor]:
        """The scales of a layer by their names, blocks in their order."""
        return {
            name: self._in_order(layer, scale) if name == "_weight_scale" else scale
            for name, scale in super().scales(layer).items()
        }

    def _in_order(self, layer: Layer, scales: Tensor) -> Tensor:
        """The scales of blocks by rows; in a file they may stand in the order of a kernel, filled up with zeros."""
        shape = shape_of_scales(layer.scheme, layer.shape)
        if not _data_of(self.tensors.metadata[layer.weight]).get("is_swizzled_scales"):
            return scales
        high, wide = (size // part for size, part in zip(_filled(shape), (128, 4), strict=True))
        octets = scales.view(torch.uint8).reshape(high, wide, 32, 4, 4).transpose(2, 3).reshape(high, wide, 128, 4)
        rows = octets.transpose(1, 2).reshape(high * 128, wide * 4)[: shape[0], : shape[1]]
        return rows.contiguous().view(scales.dtype)

    def _inputs(self, module: str, data: Mapping[str, Any]) -> Quantizer | None:
        """The quantizer of the inputs. Raises `ModelError` for one that is not read."""
        if data.get("activation_quantization") == "int8_asym_per_token":
            return self.quantizer("token(int8, symmetric=false)")
        given = data.get("act_quant_kwargs")
        if given is None and data.get("activation_quantization") is None:
            return None
        options = (given or {}).get("_data") or {}
        granularity = str((options.get("granularity") or {}).get("_type"))
        scheme = {"PerRow": "token", "PerTensor": "tensor"}.get(granularity)
        if scheme is None:
            raise ModelError(f"{self.path}: {module} quantizes its inputs in a way that is not read: {options}")
        if "mapping_type" not in options:
            return self.quantizer(f"{scheme}(e4m3)")
        if options["mapping_type"]["_data"] == "SYMMETRIC":
            return self.quantizer(f"{scheme}(int(8, narrow=false, convention=gptq))")
        return self.quantizer(f"{scheme}(int8, symmetric=false)")

    def _read(self, layer: Layer) -> PackedWeight:
        codes, scales, zeros = (self.part(layer, role) for role in ("codes", "scales", "zero_points"))
        assert codes is not None and scales is not None
        scales, width = self._in_order(layer, scales), layer.scheme.element.width
        whole = self.part(layer, "global_scale")
        if codes.dtype == torch.uint8:
            return PackedWeight(layer.scheme, from_nibbles(codes), scales, None, whole)
        zero = zeros if zeros is not None and bool(zeros.any()) else None
        return PackedWeight(layer.scheme, codes.view(torch.uint8) & (2**width - 1), scales, zero)


def _integer(data: Mapping[str, Any], symmetric: bool) -> str:
    """The format of integers, whose dtype is that of the codes if none is named."""
    width = int(str((data.get("target_dtype") or {}).get("_data", "int8")).removeprefix("int"))
    return f"int({width}, narrow=false, convention=gptq)" if symmetric else f"int{width}"


def _data_of(text: str) -> dict[str, Any]:
    """The options of a tensor, of what the metadata of its file say."""
    found: dict[str, Any] = json.loads(text)["_data"]
    return found


def _mx(element: str, size: int, rule: str) -> str:
    """A quantizer in MX, as text."""
    known = {"e2m1": "mxfp4", "e4m3": "mxfp8_e4m3", "e5m2": "mxfp8_e5m2"}
    plain = size == 32 and rule == "floor"
    return known[element] if plain else f"block({element}, {size}, scale=e8m0, rule={rule})"


def _filled(shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of scales that are filled up to whole tiles of 128 x 4."""
    return math.ceil(shape[0] / 128) * 128, math.ceil(shape[1] / 4) * 4
