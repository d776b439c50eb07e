"""The adapter of checkpoints whose weights are stored quantized: weights are dequantized, and stay as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from qsim_transformers.pretrained import Pretrained, load_pretrained
from torch import Tensor

from qsim_core import LoadedModel, ModelError
from qsim_core.quantizers.scales import Scales
from qsim_core.transforms.encoded_weights import EncodedWeight
from qsim_interop.in_model import Parameter, parameters
from qsim_interop.reading.checkpoint import READERS, open_checkpoint
from qsim_interop.reading.reader import Reader
from qsim_interop.reading.recipe import recipe_of
from qsim_interop.stored import StoredQuantization

PLAIN = ("weight", "bias")
"""The tensors of a packed layer that a plain layer has too."""
OF_CACHE = ("k_scale", "v_scale", "q_scale", "kv_scale")
"""The scales of a key-value cache."""


class Checkpoint(Pretrained):
    """Loads any family of transformers, with the weights that the checkpoint stores, in float32 exactly."""

    name = "checkpoint"
    families: ClassVar[tuple[str, ...]] = tuple(READERS)

    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """The model with its weights dequantized, with tokenizer or processor. Raises `ModelError`."""
        reader = open_checkpoint(model)
        found = parameters(reader, self.outline(model, torch.float32))
        weights, known, stored = _dequantized(reader)
        loaded = load_pretrained(self.model_class(model), model, dtype, weights=weights)
        final = {
            one.name: stored.get(one.name) or one.known_scales(known[layer.weight] for layer in one.layers)
            for one in found
        }
        loaded.final = final if dtype == torch.float32 else dict.fromkeys(final)
        return loaded

    def stored_quantization(self, source: str) -> StoredQuantization:
        """The recipe that the checkpoint stands for, and the scales of its inputs. Raises `ModelError`."""
        reader = open_checkpoint(source)
        found = parameters(reader, self.outline(source, torch.float32))
        recipe = recipe_of((one.layer for one in found), reader.plain, reader.host, reader.cache())
        scales, notes = _input_scales(reader, found)
        return StoredQuantization(reader.kind, recipe, scales, (*reader.notes, *notes))


def _input_scales(reader: Reader, found: list[Parameter]) -> tuple[dict[str, Tensor], list[str]]:
    """The static scales of the inputs of sites, and a note where layers that one product joins have several."""
    stored, scales, notes = reader.input_scales(), {}, []
    for one in found:
        for last in ("input.scale", "input.zero"):
            given = [stored[name] for layer in one.layers if (name := f"{layer.module}:{last}") in stored]
            if not given:
                continue
            largest = torch.stack(given).amax(0)
            scales[f"{one.layer.module}:{last}"] = largest
            if any(not torch.equal(largest, other) for other in given):
                if last == "input.zero":
                    raise ModelError(f"{one.name}: the zero points of its inputs differ, and one product joins them")
                notes.append(
                    f"{one.name}: the layers that it joins have {len(given)} scales of inputs, which differ; the "
                    f"largest is simulated, as vLLM computes"
                )
    return scales, notes


def _dequantized(
    reader: Reader,
) -> tuple[dict[str, Tensor], dict[str, Scales | None], dict[str, EncodedWeight | None]]:
    """All tensors of a checkpoint with its weights dequantized, the scales of those, and their codes."""
    for shard, names in reader.tensors.lost.items():
        raise ModelError(f"{reader.path} lacks {shard}, which holds {names[0]}; fetch it again")
    weights, final, stored = {}, {}, {}
    for layer in reader.layers:
        packed = reader.read(layer)
        values, final[layer.weight] = packed.dequantize(), packed.known_scales
        weights[layer.weight] = layer.as_parameter(values)
        stored[layer.weight] = None if layer.experts else packed.stored(layer.weight)
    modules = {layer.module for layer in reader.layers}
    parts = {part.name for layer in reader.layers for part in layer.parts.values()}
    for name in reader.tensors:
        module, _, last = name.rpartition(".")
        if (
            name not in weights
            and name not in parts
            and last not in OF_CACHE
            and (module not in modules or last in PLAIN)
        ):
            weights[name] = reader.tensors.read(name)
    return weights, final, stored
