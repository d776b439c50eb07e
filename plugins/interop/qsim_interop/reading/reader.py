"""The base class of readers. A reader knows how one kind of checkpoint stores its weights."""

from __future__ import annotations

import contextlib
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from qsim_core.components.host import Host
from qsim_core.errors import ModelError, one_line
from qsim_core.formats.quantizer import Quantizer
from qsim_core.quantizers.scheme import Scheme
from qsim_core.simulation.recipe import Recipe
from qsim_interop.reading.packed_weight import Layer, PackedWeight
from qsim_interop.reading.recipe import recipe_of
from qsim_interop.reading.tensors import FLOATS, Tensors

EMBEDDING = re.compile(r"embe?d|(^|\.)(wte|wpe|shared|tok_embeddings)$")
"""Found in the paths of modules that look rows up: their weights have two axes, and no matmul."""
USUALLY_LEFT = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|gate|router)$")
"""Found in the paths of heads and routers, which methods leave as they are unless they are told otherwise."""


CACHED = (("k_scale", "qk", "keys"), ("v_scale", "pv", "values"))
"""The scales of a key-value cache, the products of attention that read it, and the operands that it holds."""
PROJECTION = re.compile(r"\.[kv]_proj$")
"""The end of the paths of projections to keys and values."""


class Reader(ABC):
    """A checkpoint of one kind: the layers that it has packed, and their values."""

    method: ClassVar[str]
    """The `quant_method` in the checkpoint's configuration."""
    divides: ClassVar[bool] = False
    """True if global scales are divisors of the scales of blocks, and not factors."""
    wrong_scales: ClassVar[tuple[str, ...]] = ("not finite", "zero", "negative")
    """The scales that are wrong in such a checkpoint."""

    def __init__(self, path: Path, tensors: Tensors, config: Mapping[str, Any], host: Host) -> None:
        self.path = path
        self.tensors = tensors
        self.config = config
        self.host = host

    @property
    def kind(self) -> str:
        """The kind of the checkpoint, for people."""
        return self.method

    @property
    def cache_format(self) -> str | None:
        """The format of keys and values in the cache, under one scale each; None: none, or one that is not read."""
        return None

    @property
    def notes(self) -> list[str]:
        """Lines about what the checkpoint says and qsim does not compute."""
        return []

    @abstractmethod
    def _layers(self) -> Iterator[Layer]:
        """The packed layers, from configuration and headers."""

    @abstractmethod
    def _read(self, layer: Layer) -> PackedWeight:
        """The parts of a layer that has no faults."""

    @abstractmethod
    def targets(self, module: str) -> bool:
        """Tell if the configuration wants the weight of this module packed."""

    def check_configuration(self) -> None:
        """Read all that the configuration says. Raises `ModelError` for what cannot be read, or names no weight."""
        with self._understood():
            kind, cache, _, _ = self.kind, self.cache_format, self.notes, self.left + self.unasked
        if not self.layers and cache is None and not self.tensors.lost:
            raise ModelError(
                f"{self.path} says that it is quantized, as {kind}, and none of its weights is; take "
                f"quantization_config out of its config.json"
            )

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """The packed layers in the order of the checkpoint. Raises `ModelError`."""
        with self._understood():
            return list(self._layers())

    @functools.cached_property
    def packed(self) -> frozenset[str]:
        """The modules of the packed layers."""
        return frozenset(layer.module for layer in self.layers)

    @functools.cached_property
    def plain(self) -> list[str]:
        """The modules with a weight of two axes that is not packed, and that looks no rows up."""
        found = (name.removesuffix(".weight") for name in self.tensors if self._is_plain(name))
        return [module for module in found if module not in self.packed and not EMBEDDING.search(module)]

    @property
    def left(self) -> list[str]:
        """The modules that the configuration wants packed, and that are not. Raises `ModelError`."""
        with self._understood():
            return [module for module in self.plain if self.targets(module)]

    @property
    def unasked(self) -> list[str]:
        """The modules that are packed although the configuration leaves them out. Raises `ModelError`."""
        with self._understood():
            return [layer.module for layer in self.layers if not self.targets(layer.module)]

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """Turn what a wrong configuration brings about into `ModelError`."""
        try:
            yield
        except (re.error, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{self.path}: its quantization_config cannot be read: {one_line(error)}") from None

    def faults(self, layer: Layer) -> Iterator[str]:
        """Describe what keeps a layer from being read: parts that are missing, or of another shape."""
        shared, (_, inputs) = None if layer.weights is None else layer.weights.granularity, layer.shape
        if isinstance(shared, int) and inputs % shared:
            yield f"its groups of {shared} do not divide K = {inputs}"
            return
        for part in layer.parts.values():
            if part.name not in self.tensors:
                yield f"lacks {part.name.removeprefix(f'{layer.module}.')}"
            elif (shape := self.tensors[part.name].shape) != part.shape:
                what = part.name.removeprefix(f"{layer.module}.")
                yield f"{what} has shape {list(shape)}, and a weight of {list(layer.shape)} needs {list(part.shape)}"

    def read(self, layer: Layer) -> PackedWeight:
        """The codes, scales and zero points of a layer. Raises `ModelError` for one that has a fault."""
        for fault in self.faults(layer):
            raise ModelError(f"{self.path}: {layer.module}: {fault}; fetch or quantize the checkpoint again")
        return self._read(layer)

    def dequantize(self, layer: Layer) -> Tensor:
        """The values of a layer's weight in float32. Raises `ModelError` for one that has a fault."""
        return self.read(layer).dequantize()

    def scales(self, layer: Layer) -> dict[str, Tensor]:
        """The scales of a layer by their names, for someone to look at."""
        roles = ("scales", "global_scale", "input_scale", "input_global_scale")
        return {
            layer.parts[role].name.removeprefix(f"{layer.module}."): self.tensors.read(layer.parts[role].name)
            for role in roles
            if role in layer.parts
        }

    def part(self, layer: Layer, role: str) -> Tensor | None:
        """The stored tensor of a role, or None if the layer has no such part."""
        return self.tensors.read(layer.parts[role].name) if role in layer.parts else None

    def input_scales(self) -> dict[str, Tensor]:
        """The static scales of the inputs of layers, as `Simulation.state_dict` names them. Raises `ModelError`."""
        roles = {"input_scale": "scale", "input_zero_point": "zero", "input_global_scale": "scale"}
        found = {}
        for layer in self.layers:
            for role in roles.keys() & layer.parts.keys():
                value = self.tensors.read(layer.parts[role].name).float().reshape(1, 1)
                inverse = role == "input_global_scale" and self.divides
                found[f"{layer.module}:input.{roles[role]}"] = 1 / value if inverse else value
        return found

    def cache(self) -> dict[str, dict[str, str]]:
        """The quantizers of keys and values in the cache, as overrides of attention's products.

        Scales lie with the attention, or with its projections. Servers take 1 where the checkpoint has none.
        Raises `ModelError` for a scale that is not one number.
        """
        form = self.cache_format
        found = {}
        for last, product, role in CACHED if form is not None else ():
            scales = [name for name in self.tensors if name.rpartition(".")[2] == last]
            for name in scales:
                value = self.tensors.read(name).float()
                if value.numel() != 1:
                    raise ModelError(
                        f"{self.path}: {name} has shape {list(value.shape)}; one scale of the cache is read"
                    )
                module = PROJECTION.sub("", name.rpartition(".")[0])
                found[f"{module}:{product}"] = {role: f"at_scale({form}, {float(value)!r})"}
            if not scales:
                found[f"*:{product}"] = {role: f"at_scale({form}, 1.0)"}
        return found

    @property
    def recipe(self) -> Recipe:
        """The recipe that the checkpoint stands for. Raises `ModelError`."""
        return recipe_of(self.layers, self.plain, self.host, self.cache())

    def scheme(self, text: str) -> Scheme:
        """The quantizer of a text. Raises `SpecError` if a plugin that it needs is not installed."""
        found: Scheme = self.host.parse(text, Scheme)
        return found

    def quantizer(self, text: str) -> Quantizer:
        """The quantizer of a text. Raises `SpecError` if a plugin that it needs is not installed."""
        found: Quantizer = self.host.parse(text, Quantizer)
        return found

    def _is_plain(self, name: str) -> bool:
        stored = self.tensors[name]
        return name.endswith(".weight") and stored.dtype in FLOATS and len(stored.shape) == 2


def is_inside(module: str, names: Iterable[str]) -> bool:
    """Tell if a module is, or lies inside, one that a list names by its path or by the end of it."""
    return any(f".{name}." in f".{module}." for name in names)
