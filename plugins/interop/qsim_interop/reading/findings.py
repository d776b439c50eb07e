"""Look through a checkpoint for what would make a server compute something else than was meant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qsim_core.simulation.recipe import Recipe
from qsim_interop.reading.packed_weight import OF_WEIGHT, Layer
from qsim_interop.reading.reader import Reader

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
"""Layers that servers fuse into one product, which has one global scale."""
GLOBAL = {"global_scale": "global scales", "input_global_scale": "global scales of inputs"}
"""The parts of which fused layers have one."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a checkpoint."""

    where: str
    """The layer, or the file."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Examined:
    """A checkpoint that was looked through."""

    kind: str
    recipe: Recipe
    layers: list[Layer]
    """The packed layers."""
    plain: list[str]
    """The modules whose weights of two axes are not packed."""
    bits_per_weight: float | None
    """Of packed weights, with scales and zero points; None: nothing is packed."""
    bits_of_all: float | None
    """Of all parameters of the checkpoint."""
    findings: list[Finding]
    notes: list[str]


def examine(reader: Reader) -> Examined:
    """Look through a checkpoint: headers, scales and zero points are read, and no codes. Raises `ModelError`."""
    packed, of_all = _bits(reader)
    return Examined(
        kind=reader.kind,
        recipe=reader.recipe,
        layers=reader.layers,
        plain=reader.plain,
        bits_per_weight=packed,
        bits_of_all=of_all,
        findings=list(_findings(reader)),
        notes=reader.notes,
    )


def _bits(reader: Reader) -> tuple[float | None, float | None]:
    """The bits of a packed weight, and of any parameter, each with its scales and zero points."""
    tensors = reader.tensors
    parts = {part.name for layer in reader.layers for part in layer.parts.values()}
    codes = [tensors[layer.parts["codes"].name].bits for layer in reader.layers]
    beside = [
        tensors[part.name].bits
        for layer in reader.layers
        for role, part in layer.parts.items()
        if role in OF_WEIGHT and role != "codes" and part.name in tensors
    ]
    count = sum(math.prod(layer.shape) for layer in reader.layers)
    if not count:
        return None, None
    others = [stored for name, stored in tensors.items() if name not in parts and not name.endswith("weight_shape")]
    bits = sum(codes) + sum(beside)
    whole = count + sum(math.prod(stored.shape) for stored in others)
    return bits / count, (bits + sum(stored.bits for stored in others)) / whole


def _findings(reader: Reader) -> Iterator[Finding]:
    lost = reader.tensors.lost
    for shard, names in lost.items():
        yield Finding(shard, f"is missing, with {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}")
    elsewhere = {name for names in lost.values() for name in names}
    whole = []
    for layer in reader.layers:
        if any(part.name in elsewhere for part in layer.parts.values()):
            continue
        faults = list(reader.faults(layer))
        yield from (Finding(layer.module, fault) for fault in faults)
        if not faults:
            whole.append(layer)
    for layer in whole:
        yield from _of_scales(reader, layer)
    yield from _of_fused(reader, whole)
    for module in reader.left:
        yield Finding(
            module, f"is not packed ({reader.tensors[f'{module}.weight'].dtype}), and the configuration targets it"
        )
    for module in reader.unasked:
        yield Finding(module, "is packed, and the configuration leaves it out")


def _of_scales(reader: Reader, layer: Layer) -> Iterator[Finding]:
    """Find scales that are not positive numbers."""
    for what, stored in reader.scales(layer).items():
        values = stored.float()
        wrong = {"not finite": ~values.isfinite(), "zero": values == 0, "negative": values < 0}
        for how in reader.wrong_scales:
            if count := int(wrong[how].sum()):
                yield Finding(layer.module, f"{count} of {values.numel()} values of {what} are {how}")


def _of_fused(reader: Reader, layers: list[Layer]) -> Iterator[Finding]:
    """Find layers that servers fuse and whose global scales differ."""
    modules = {layer.module: layer for layer in layers}
    for together in FUSED:
        for module in modules:
            parent, _, last = module.rpartition(".")
            found = [modules[name] for end in together if (name := f"{parent}.{end}" if parent else end) in modules]
            if last != together[0] or len(found) < 2:
                continue
            for role, what in GLOBAL.items():
                values = [float(part) for layer in found if (part := reader.part(layer, role)) is not None]
                if len(values) == len(found) and min(values) > 0 and max(values) > min(values):
                    ends = ", ".join(layer.module.rpartition(".")[2] for layer in found)
                    yield Finding(
                        parent or module,
                        f"the {what} of {ends} differ by up to a factor of {max(values) / min(values):.4g}; servers "
                        f"fuse these layers and use one",
                    )
