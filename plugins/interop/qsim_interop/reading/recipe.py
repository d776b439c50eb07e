"""The recipe that a checkpoint stands for: quantizers at its packed layers, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qsim_core.components.host import Host
from qsim_core.simulation.recipe import Recipe
from qsim_interop.reading.packed_weight import Layer


def recipe_of(
    layers: Iterable[Layer], plain: Iterable[str], host: Host, cache: Mapping[str, Mapping[str, str]] | None = None
) -> Recipe:
    """The recipe of packed layers; `plain` names the modules that stay as they are, `cache` has overrides of attention.

    Layers that end in the same name, and are all packed in the same way, share a pattern like `*.q_proj`.
    """
    said = {layer.module: quantizers for layer in layers if (quantizers := _quantizers(layer))}
    by_end: dict[str, list[dict[str, str] | None]] = {}
    for module in {**dict.fromkeys(plain), **said}:
        by_end.setdefault(module.rpartition(".")[2], []).append(said.get(module))
    overrides: dict[str, Any] = {}
    for module, quantizers in said.items():
        parent, _, last = module.rpartition(".")
        alike = all(other == quantizers for other in by_end[last])
        overrides[f"*.{last}" if parent and alike else module] = quantizers
    return Recipe.of({"overrides": {**overrides, **(cache or {})}}, host)


def _quantizers(layer: Layer) -> dict[str, str]:
    found = {"weights": layer.weights, "activations": layer.activations}
    return {key: str(quantizer) for key, quantizer in found.items() if quantizer is not None}
