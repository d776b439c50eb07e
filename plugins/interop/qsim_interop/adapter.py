"""The adapter of checkpoints whose weights are stored quantized: weights are dequantized, and stay as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from qsim_transformers.pretrained import Pretrained, load_pretrained
from torch import Tensor

from qsim_core import LoadedModel, ModelError
from qsim_core.quantizers.scales import Scales
from qsim_interop.reading.checkpoint import READERS, open_checkpoint
from qsim_interop.reading.reader import Reader
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
        weights, final = _dequantized(reader)
        loaded = load_pretrained(self.model_class(model), model, dtype, weights=weights)
        known = {name for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
        for name in final:
            if name not in known:
                raise ModelError(
                    f"{model} stores {name} quantized, and {type(loaded.model).__name__} has no parameter of that "
                    f"name; take the checkpoint that it was made from"
                )
        loaded.final = final if dtype == torch.float32 else dict.fromkeys(final)
        return loaded

    def stored_quantization(self, source: str) -> StoredQuantization:
        """The recipe that the checkpoint stands for, and the scales of its inputs. Raises `ModelError`."""
        reader = open_checkpoint(source)
        return StoredQuantization(reader.kind, reader.recipe, reader.input_scales(), tuple(reader.notes))


def _dequantized(reader: Reader) -> tuple[dict[str, Tensor], dict[str, Scales | None]]:
    """All tensors of a checkpoint with its weights dequantized, and the scales of those."""
    for shard, names in reader.tensors.lost.items():
        raise ModelError(f"{reader.path} lacks {shard}, which holds {names[0]}; fetch it again")
    weights, final = {}, {}
    for layer in reader.layers:
        packed = reader.read(layer)
        weights[layer.weight], final[layer.weight] = packed.dequantize(), packed.known_scales
    modules = {layer.module for layer in reader.layers}
    for name in reader.tensors:
        module, _, last = name.rpartition(".")
        if name not in weights and last not in OF_CACHE and (module not in modules or last in PLAIN):
            weights[name] = reader.tensors.read(name)
    return weights, final
