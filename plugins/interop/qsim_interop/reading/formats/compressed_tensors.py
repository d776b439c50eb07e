"""Checkpoints of compressed-tensors, which llm-compressor writes and vLLM reads.

A group of the configuration says for the layers that it targets how weights and inputs are quantized. `weight_scale`
is a factor; `weight_global_scale` is a divisor of the block scales. Integers have the full range, and a symmetric scale
maps the largest magnitude to half the span of the codes: 7.5 for 4 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsim_core.errors import ModelError
from qsim_core.formats.quantizer import Quantizer
from qsim_core.quantizers.scheme import Scheme
from qsim_interop.reading.formats.bit_fields import from_nibbles, from_words, twos_complement
from qsim_interop.reading.packed_weight import Layer, PackedWeight, Part, shape_of_scales
from qsim_interop.reading.reader import CACHED, Reader
from qsim_interop.reading.tensors import SCALE_FORMATS

FLOAT_FORMATS = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
"""The float formats by their bits."""
UNREAD = {
    "marlin-24": "ordered for one kernel",
    "sparse-bitmask": "without their zeros",
    "sparse-24-bitmask": "without their zeros",
}
"""The formats that are not read, and the reason."""
LINEAR = "Linear"
"""The class in the targets of almost every configuration."""


class CompressedTensors(Reader):
    """Every scheme of weights of compressed-tensors, but packed 6-bit floats."""

    method: ClassVar[str] = "compressed-tensors"
    divides: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return f"{self.method} ({self.config.get('format')})"

    @property
    def notes(self) -> list[str]:
        cache = self.config.get("kv_cache_scheme")
        if not cache or self.cache_format is not None or self._finds_scales(cache):
            return []
        return [f"the checkpoint asks for a key-value cache in {self._text(cache, 'input')}, which is not simulated"]

    @property
    def cache_format(self) -> str | None:
        args = self.config.get("kv_cache_scheme") or {}
        whole = (args.get("strategy") or "tensor") == "tensor" and args.get("symmetric", True)
        if not args or args.get("dynamic") or not whole:
            return None
        return "e4m3" if args.get("type") == "float" else f"int({args['num_bits']}, narrow=false)"

    def cache(self) -> dict[str, dict[str, str]]:
        """The quantizers of keys and values; scales that are dynamic are found anew in each forward."""
        args = self.config.get("kv_cache_scheme") or {}
        if not self._finds_scales(args):
            return super().cache()
        text = self._text(args, "input")
        return {f"*:{product}": {role: text} for _, product, role in CACHED}

    @staticmethod
    def _finds_scales(args: Mapping[str, Any]) -> bool:
        """Tell if a cache has a scale for each token of a head, found when it is stored."""
        return args.get("dynamic") is True and args.get("strategy") == "token"

    def targets(self, module: str) -> bool:
        return self._group(module) is not None and not _matches(module, self.config.get("ignore") or ())

    def _group(self, module: str) -> Mapping[str, Any] | None:
        """The group of the configuration that is for a module: a name before a pattern before a class."""
        groups = [group for group in (self.config.get("config_groups") or {}).values() if group.get("weights")]
        for fits in (_is_named, _is_like, _is_linear):
            for group in groups:
                if any(fits(module, target) for target in group.get("targets") or ()):
                    return dict(group)
        return None

    def _layers(self) -> Iterator[Layer]:
        sparse = self.config.get("sparsity_config") or {}
        for form in (self.config.get("format"), sparse.get("format")):
            if form in UNREAD:
                raise ModelError(
                    f"{self.path} has the format {form!r}, which is not read: its codes are {UNREAD[form]}; of "
                    f"{self.method}, dense formats are read: take the checkpoint that it was made from"
                )
        for name, stored in self.tensors.items():
            module, _, last = name.rpartition(".")
            packed = last == "weight_packed" or (last == "weight" and stored.dtype in ("I8", "F8_E4M3", "F8_E5M2"))
            if packed:
                group = self._group(module)
                if group is None:
                    raise ModelError(f"{self.path}: {module} is packed, and no group of the configuration targets it")
                yield self._layer(module, name, group)

    def _layer(self, module: str, codes: str, group: Mapping[str, Any]) -> Layer:
        args, inputs = group["weights"], group.get("input_activations")
        shape = self._shape(module, codes, args)
        symmetric, width = args.get("symmetric", True), args["num_bits"]
        weights = self._weights(module, args)
        stored = shape_of_scales(weights, shape)
        parts = {
            "codes": Part(codes, _packed_shape(self.tensors[codes].dtype, shape, width)),
            "scales": Part(f"{module}.weight_scale", stored),
        }
        if not symmetric:
            words = math.ceil(stored[0] * width / 32)
            packs = codes.endswith("_packed") and args.get("strategy") in ("group", "channel")
            parts["zero_points"] = Part(f"{module}.weight_zero_point", (words, stored[1]) if packs else stored)
        if f"{module}.weight_g_idx" in self.tensors:  # act-order by groups, which older versions wrote
            parts["groups"] = Part(f"{module}.weight_g_idx", (shape[1],))
        if args.get("strategy") == "tensor_group":
            parts["global_scale"] = Part(f"{module}.weight_global_scale", (1,))
        if inputs and inputs.get("dynamic") == "local":
            parts["input_global_scale"] = Part(f"{module}.input_global_scale", (1,))
        elif inputs and not inputs.get("dynamic"):
            parts["input_scale"] = Part(f"{module}.input_scale", (1,))
            if not inputs.get("symmetric", True):
                parts["input_zero_point"] = Part(f"{module}.input_zero_point", (1,))
        return Layer(module, shape, weights, self._activations(inputs), self._as_stored(parts))

    def _as_stored(self, parts: dict[str, Part]) -> dict[str, Part]:
        """Accept a scale of the whole tensor in any shape of one element."""
        for role, part in parts.items():
            stored = self.tensors.get(part.name)
            if stored is not None and math.prod(part.shape) == math.prod(stored.shape) == 1:
                parts[role] = Part(part.name, stored.shape)
        return parts

    def _shape(self, module: str, codes: str, args: Mapping[str, Any]) -> tuple[int, int]:
        """The shape of the weight. Raises `ModelError` for one that is not a matrix."""
        stored = self.tensors[codes]
        if len(stored.shape) != 2:
            raise ModelError(f"{self.path}: {codes} has {len(stored.shape)} axes; weights of two axes are read")
        rows, columns = stored.shape
        if f"{module}.weight_shape" in self.tensors:
            rows, columns = self.tensors.read(f"{module}.weight_shape").tolist()
        elif stored.dtype == "U8":
            columns *= 2
        elif stored.dtype == "I32":
            columns = columns * 32 // args["num_bits"]
        return rows, columns

    def _weights(self, module: str, args: Mapping[str, Any]) -> Scheme:
        name = f"{module}.weight_scale"
        scale = SCALE_FORMATS.get(self.tensors[name].dtype, "") if name in self.tensors else ""
        return self.scheme(self._text(args, "weight", scale))

    def _activations(self, args: Mapping[str, Any] | None) -> Quantizer | None:
        return None if not args else self.quantizer(self._text(args, "input", "e8m0" if _is_mx(args) else ""))

    def _text(self, args: Mapping[str, Any], of: str, scale: str = "") -> str:
        """The quantizer that arguments of compressed-tensors stand for, as text. Raises `ModelError`."""
        width, strategy = args["num_bits"], args.get("strategy") or ("group" if args.get("group_size") else "tensor")
        symmetric, size = args.get("symmetric", True), args.get("group_size")
        if args.get("type") == "float":
            element = FLOAT_FORMATS.get(width)
        elif 2 <= width <= 8:
            element = f"int({width}, narrow=false, convention=gptq)" if symmetric else f"int{width}"
        else:
            element = None
        if element is None:
            raise ModelError(f"{self.path}: {args.get('type')} of {width} bits is not read")
        more = "" if symmetric else ", symmetric=false"
        if scale == "e8m0" and element == "e2m1" and size == 32:
            return "mxfp4"
        if scale == "e8m0" and element == "e4m3" and size == 32:
            return "mxfp8_e4m3"
        if strategy == "tensor_group" and args.get("dynamic") == "local":
            return f"scaled({element}, {size}, scale=scaled(e4m3, static=true))"
        if strategy == "tensor_group":
            return "nvfp4" if size == 16 else f"scaled({element}, {size}, scale=scaled(e4m3))"
        if scale:
            more += f", scale={scale}"
        if strategy == "group":
            return f"block({element}, {size}{more})"
        if strategy == "block":
            return f"block({element}, {list(args['block_structure'])}{more})"
        if of == "input" and strategy == "tensor" and not args.get("dynamic"):
            more += ", static=true"
        if strategy in ("tensor", "channel", "token"):
            return f"{strategy}({element}{more})"
        raise ModelError(f"{self.path}: the strategy {strategy!r} is not read")

    def _read(self, layer: Layer) -> PackedWeight:
        codes, scales = self.part(layer, "codes"), self.part(layer, "scales")
        assert codes is not None and scales is not None
        width, zeros = layer.scheme.element.width, self.part(layer, "zero_points")
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = from_words(zeros.T, width, layer.shape[0]).T.to(torch.int16) - 2 ** (width - 1)
        groups = self.part(layer, "groups")
        return PackedWeight(
            layer.scheme,
            _unpacked(codes, width, layer.shape[1]),
            scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else torch.atleast_2d(scales),
            zeros if zeros is None else torch.atleast_2d(zeros),
            self.part(layer, "global_scale"),
            applied="divide",
            groups=None if groups is None or bool((groups < 0).any()) else groups,
        )


def _unpacked(codes: Tensor, width: int, columns: int) -> Tensor:
    """The codes one by one, integers in two's complement."""
    if codes.dtype == torch.int32:
        return twos_complement(from_words(codes, width, columns), width)
    if codes.dtype == torch.uint8:
        return from_nibbles(codes)
    octets: Tensor = codes.view(torch.uint8) & (2**width - 1)
    return octets


def _packed_shape(dtype: str, shape: tuple[int, int], width: int) -> tuple[int, int]:
    """The shape of the tensor that holds the codes of a weight."""
    rows, columns = shape
    if dtype == "I32":
        return rows, math.ceil(columns * width / 32)
    return (rows, columns // 2) if dtype == "U8" else shape


def _is_mx(args: Mapping[str, Any]) -> bool:
    """True for power-of-two scales: their dtype is an integer."""
    return args.get("scale_dtype") in ("uint8", "torch.uint8")


def _matches(module: str, targets: Any) -> bool:
    return any(_is_named(module, target) or _is_like(module, target) for target in targets)


def _is_named(module: str, target: str) -> bool:
    return module == target


def _is_like(module: str, target: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _is_linear(module: str, target: str) -> bool:
    return target == LINEAR
