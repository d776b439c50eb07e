"""The packed layers of a checkpoint as parameters of a model, where transformers joins several of them in one.

Checkpoints hold the experts of a layer one by one, and transformers stacks them in one parameter [E, rows, K].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import ModelError
from qsim_core.quantizers.scales import Scales
from qsim_interop.reading.packed_weight import Layer
from qsim_interop.reading.reader import Reader


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a model, and the packed layers whose rows it holds, in the order of the rows."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def layer(self) -> Layer:
        """The quantizers of the parameter, under the name of its site. Raises `ModelError` if its layers differ."""
        first = self.layers[0]
        for other in self.layers[1:]:
            if (other.weights, other.activations) != (first.weights, first.activations):
                raise ModelError(
                    f"{self.name} joins {first.module} and {other.module}, which are packed in different ways; one "
                    f"quantizer for all of its rows is evaluated"
                )
        return dataclasses.replace(first, module=self.name.removesuffix(".weight"))

    def known_scales(self, found: Iterable[Scales | None]) -> Scales | None:
        """The scales of all rows, one below the other; None where those of a layer are not known."""
        rows = []
        for layer, one in zip(self.layers, found, strict=True):
            if one is None:
                return None
            count = layer.shape[0] // one.scale.shape[0]
            rows.append([None if part is None else part.repeat(count, 1) for part in one])
        scales, zeros = zip(*rows, strict=True)
        if any(zero is None for zero in zeros):  # a layer without zero points has all of them at 0
            zeros = tuple(torch.zeros_like(s) if z is None else z for s, z in zip(scales, zeros, strict=True))
            zeros = zeros if any(bool(zero.any()) for zero in zeros) else ()
        return Scales(torch.cat(scales), torch.cat(zeros) if zeros else None)


def parameters(reader: Reader, model: Any) -> list[Parameter]:
    """The parameters of a model that a checkpoint stores packed. Raises `ModelError` for one that it packs in part.

    transformers' own conversion says which rows of a parameter are which layer.
    """
    shapes = {name: one.shape for name, one in model.named_parameters(remove_duplicate=False)}
    by_weight = {layer.weight: layer for layer in reader.layers}
    found: dict[str, tuple[Layer, ...]] = {name: (layer,) for name, layer in by_weight.items() if name in shapes}
    joined = {name: shape for name, shape in shapes.items() if len(shape) > 1 and name not in found}
    if len(found) < len(by_weight):
        found |= dict(_joined(reader, model, joined, by_weight))
    held = {layer.weight for layers in found.values() for layer in layers}
    for name in by_weight.keys() - held:
        raise ModelError(
            f"{reader.path} stores {name} quantized, and {type(model).__name__} has no parameter of that name; take "
            f"the checkpoint that it was made from"
        )
    return [Parameter(name, layers) for name, layers in found.items()]


def _joined(
    reader: Reader, model: Any, shapes: dict[str, Any], by_weight: dict[str, Layer]
) -> Iterator[tuple[str, tuple[Layer, ...]]]:
    """The parameters that are joined from several packed layers, and these."""
    from transformers.core_model_loading import revert_weight_conversion

    places, count = {}, 0
    for name, shape in shapes.items():
        rows = shape[:-1].numel()
        places[name] = torch.arange(count, count + rows, dtype=torch.int32).reshape(*shape[:-1], 1)
        count += rows
    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(places))
    firsts = {int(rows.flatten()[0]): (name, rows) for name, rows in stored.items() if rows.numel()}
    for parameter, rows in places.items():
        layers: list[str] = []
        plain: list[str] = []
        place, end = int(rows.flatten()[0]), int(rows.flatten()[-1]) + 1
        while place < end and place in firsts:
            name, part = firsts[place]
            (layers if name in by_weight else plain).append(name)
            place += part.numel()
        if layers and (plain or place < end):
            raise ModelError(
                f"{reader.path}: {parameter} holds {layers[0]}, which is quantized, and other rows that are not"
            )
        if layers:
            yield parameter, tuple(by_weight[name] for name in layers)
