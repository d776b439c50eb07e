"""Checkpoints of NVIDIA's ModelOpt: FP8 with a scale of the tensor, and NVFP4.

`weight_scale_2` is the global scale, a factor. `input_scale` is a factor too: of FP8 inputs the scale, and of NVFP4
inputs the global scale. Newer files of ModelOpt say it in config.json, older ones in hf_quant_config.json.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from qsim_core.errors import ModelError
from qsim_interop.reading.formats.bit_fields import from_nibbles
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part, shape_of_scales
from qsim_interop.reading.reader import USUALLY_LEFT, Reader, is_inside

ALGORITHMS = ("FP8", "NVFP4", "NVFP4_AWQ", "MIXED_PRECISION")
"""The values of `quant_algo` whose layers are read."""
WEIGHTS = {"F8_E4M3": "tensor(e4m3)", "U8": "nvfp4"}
"""The dtypes of packed weights, and the quantizers that they stand for."""


class ModelOpt(Reader):
    """Weights in FP8 and NVFP4, layer by layer."""

    method: ClassVar[str] = "modelopt"

    @property
    def kind(self) -> str:
        return f"{self.method} ({self.config.get('quant_algo')})"

    @property
    def notes(self) -> list[str]:
        cache = self._cache
        known = not cache or self.cache_format is not None
        return [] if known else [f"the checkpoint asks for a key-value cache in {cache}, which is not simulated"]

    @property
    def cache_format(self) -> str | None:
        eight = {"num_bits": 8, "type": "float"}.items()
        fp8 = self._cache == "FP8" or (isinstance(self._cache, dict) and eight <= self._cache.items())
        return "e4m3" if fp8 else None

    @property
    def _cache(self) -> Any:
        return self.config.get("kv_cache_quant_algo") or self.config.get("kv_cache_scheme")

    def targets(self, module: str) -> bool:
        layers = self.config.get("quantized_layers")
        if layers:
            return module in layers
        left = self.config.get("exclude_modules") or self.config.get("ignore") or ()
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in left) or is_inside(module, left):
            return False
        return not USUALLY_LEFT.search(module)

    def _layers(self) -> Iterator[Layer]:
        algorithm = self.config.get("quant_algo")
        if algorithm not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise ModelError(f"{self.path} is quantized by the algorithm {algorithm}; of modelopt, {known} are read")
        for name, stored in self.tensors.items():
            module, _, last = name.rpartition(".")
            if last == "weight" and stored.dtype in WEIGHTS:
                if len(stored.shape) != 2:
                    raise ModelError(f"{self.path}: {name} has {len(stored.shape)} axes; weights of two axes are read")
                yield self._layer(module, stored.dtype, (stored.shape[0], stored.shape[1]))

    def _layer(self, module: str, dtype: str, stored: tuple[int, int]) -> Layer:
        rows, columns = stored
        four = dtype == "U8"
        weights, shape = self.scheme(WEIGHTS[dtype]), (rows, 2 * columns if four else columns)
        parts = {
            "codes": Part(f"{module}.weight", stored),
            "scales": self._single(f"{module}.weight_scale", shape_of_scales(weights, shape)),
        }
        if four:
            parts["global_scale"] = self._single(f"{module}.weight_scale_2", (1, 1))
        inputs = None
        if f"{module}.input_scale" in self.tensors:
            role = "input_global_scale" if four else "input_scale"
            parts[role] = self._single(f"{module}.input_scale", (1, 1))
            inputs = self.quantizer("nvfp4_static" if four else "tensor(e4m3, static=true)")
        return Layer(module, shape, weights, inputs, parts)

    def _single(self, name: str, shape: tuple[int, int]) -> Part:
        """A part, whose shape may have any number of axes if it is one number."""
        stored = self.tensors.get(name)
        alike = stored is not None and math.prod(stored.shape) == math.prod(shape) == 1
        return Part(name, stored.shape if stored is not None and alike else shape)

    def _read(self, layer: Layer) -> PackedWeight:
        codes, scales = self.part(layer, "codes"), self.part(layer, "scales")
        assert codes is not None and scales is not None
        units = from_nibbles(codes) if codes.dtype == torch.uint8 else codes.view(torch.uint8)
        return PackedWeight(layer.scheme, units, torch.atleast_2d(scales), None, self.part(layer, "global_scale"))
