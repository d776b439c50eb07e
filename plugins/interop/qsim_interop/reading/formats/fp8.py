"""FP8 checkpoints of transformers and DeepSeek: E4M3 weights with one scale, or one for each tile of 128 x 128.

The scale is a factor, also where its name ends in `_inv`. Inputs are quantized in each forward, by rows of 128 beside
tiles and by tensor otherwise, or with a scale of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch

from qsim_core.errors import ModelError
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part, shape_of_scales
from qsim_interop.reading.reader import USUALLY_LEFT, Reader, is_inside

FORMATS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
"""The dtypes of packed weights, and the formats that they stand for."""
SCALES = ("weight_scale_inv", "weight_scale")
"""The names of a weight's scale."""
INPUT_SCALES = ("input_scale", "activation_scale")
"""The names of the scale of the inputs."""


class FP8(Reader):
    """Weights in FP8, by tensor or by tile."""

    method: ClassVar[str] = "fp8"

    def targets(self, module: str) -> bool:
        named = self.config.get("modules_to_not_convert") or self.config.get("ignored_layers")
        return not (is_inside(module, named) if named else USUALLY_LEFT.search(module))

    def _layers(self) -> Iterator[Layer]:
        for name, stored in self.tensors.items():
            module, _, last = name.rpartition(".")
            if last == "weight" and stored.dtype in FORMATS:
                if len(stored.shape) != 2:
                    raise ModelError(f"{self.path}: {name} has {len(stored.shape)} axes; weights of two axes are read")
                yield self._layer(module, FORMATS[stored.dtype], (stored.shape[0], stored.shape[1]))

    def _layer(self, module: str, element: str, shape: tuple[int, int]) -> Layer:
        tile = self.config.get("weight_block_size")
        scale = self._name(module, SCALES)
        powers = scale in self.tensors and self.tensors[scale].dtype in ("F8_E8M0", "U8")
        more = ", scale=e8m0" if powers else ""
        weights = self.scheme(f"block({element}, {list(tile)}{more})" if tile else f"tensor({element}{more})")
        parts = {"codes": Part(f"{module}.weight", shape)}
        stored = self.tensors.get(scale)
        single = stored is not None and not tile and math.prod(stored.shape) == 1
        parts["scales"] = Part(scale, stored.shape if stored and single else shape_of_scales(weights, shape))
        if self.config.get("activation_scheme") == "static":
            given = self._name(module, INPUT_SCALES)
            parts["input_scale"] = Part(given, self.tensors[given].shape if given in self.tensors else ())
            inputs = f"tensor({element}, static=true)"
        else:
            inputs = f"block({element}, {tile[1]})" if tile else f"tensor({element})"
        return Layer(module, shape, weights, self.quantizer(inputs), parts)

    def _name(self, module: str, names: tuple[str, ...]) -> str:
        """The first of these names under which the module has a tensor; else the first."""
        known = (f"{module}.{name}" for name in names)
        return next((name for name in known if name in self.tensors), f"{module}.{names[0]}")

    def _read(self, layer: Layer) -> PackedWeight:
        codes, scales = self.part(layer, "codes"), self.part(layer, "scales")
        assert codes is not None and scales is not None
        scales = scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
        return PackedWeight(layer.scheme, codes.view(torch.uint8), torch.atleast_2d(scales))
