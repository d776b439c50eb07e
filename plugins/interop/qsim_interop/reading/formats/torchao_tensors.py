"""Checkpoints of torchao, as transformers writes them in safetensors files.

The metadata of a file say for each weight which class of tensor it was, and its stored parts are `_weight_qdata`,
`_weight_scale` and `_weight_zero_point`. A symmetric scale maps the largest magnitude to half the span of the codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from qsim_core.errors import ModelError
from qsim_core.formats.quantizer import Quantizer
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part, shape_of_scales
from qsim_interop.reading.reader import USUALLY_LEFT, Reader, is_inside
from qsim_interop.reading.tensors import SCALE_FORMATS

CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
"""The classes of tensors that are read."""
PARTS = {"qdata": "codes", "scale": "scales", "zero_point": "zero_points"}
"""The stored parts of such a tensor, and their roles."""
FLOATS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
"""The dtypes of the codes of floats, and their formats."""


class TorchAO(Reader):
    """Integers of up to 8 bits, a code in each byte, and FP8."""

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
        width = layer.scheme.element.width
        zero = zeros if zeros is not None and bool(zeros.any()) else None
        return PackedWeight(layer.scheme, codes.view(torch.uint8) & (2**width - 1), scales, zero)


def _integer(data: Mapping[str, Any], symmetric: bool) -> str:
    """The format of integers, whose dtype is that of the codes if none is named."""
    width = int(str((data.get("target_dtype") or {}).get("_data", "int8")).removeprefix("int"))
    return f"int({width}, narrow=false, convention=gptq)" if symmetric else f"int{width}"
