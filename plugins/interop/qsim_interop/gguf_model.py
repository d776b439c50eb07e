"""The adapter of GGUF files: weights are dequantized from the codes and scales in the file, and stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from qsim_transformers.pretrained import TOKENIZERS, Pretrained, load_model
from torch import Tensor, nn

from qsim_core import LoadedModel, ModelError
from qsim_core.components.host import installed
from qsim_core.errors import one_line
from qsim_core.quantizers.scales import Scales
from qsim_interop.llama_cpp import ARCHITECTURES, tensor_names, unpaired
from qsim_interop.reading.formats.gguf_file import GGUF
from qsim_interop.reading.packed_weight import Layer
from qsim_interop.reading.recipe import recipe_of
from qsim_interop.stored import StoredQuantization

FREQUENCIES = "rope_freqs.weight"
"""The tensor with the numbers by which llama.cpp divides the frequencies of the rotary embedding, as Llama 3.1 has."""


class GGUFModel(Pretrained):
    """Loads a GGUF file of llama.cpp as a model of transformers, with the values of the codes that the file stores.

    The tokenizer is the one that lies beside the file, or that transformers makes of the file.
    """

    name = "gguf"
    endings: ClassVar[tuple[str, ...]] = (".gguf",)

    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """The model with its weights dequantized, with its tokenizer. Raises `ModelError`."""
        file = _File(model)
        tokenizer, (weights, final) = file.tokenizer(), file.weights()
        loaded = load_model(type(file.outline), model, dtype, weights=weights, config=file.config)
        if FREQUENCIES in file.reader.tensors:
            loaded.model.rotary_emb.inv_freq.div_(file.reader.tensors.read(FREQUENCIES))
        return LoadedModel(loaded, tokenizer, final=final if dtype == torch.float32 else dict.fromkeys(final))

    def outline(self, model: str, dtype: torch.dtype) -> nn.Module:
        """The model on the meta device. Raises `ModelError`."""
        found: nn.Module = _File(model).outline.to(dtype).eval()
        return found

    def model_class(self, model: str) -> Any:
        """The language model of the family. Raises `ModelError`."""
        return type(_File(model).outline)

    def configuration(self, source: str) -> Mapping[str, Any]:
        """The configuration that transformers makes of the file. Raises `ModelError`."""
        return dict(_File(source).config.to_dict())

    def evaluator_of(self, model: str) -> str:
        """Perplexity: the files that are read hold language models."""
        return "perplexity"

    def stored_quantization(self, source: str) -> StoredQuantization | None:
        """The quantizers of the packed layers; None where the file packs nothing. Raises `ModelError`."""
        file = _File(source)
        if not file.reader.layers:
            return None
        recipe = recipe_of(file.layers(), file.plain(), file.reader.host)
        return StoredQuantization(file.reader.kind, recipe, notes=tuple(file.reader.values_alone))


class _File:
    """A GGUF file, and the model of transformers that it holds."""

    def __init__(self, path: str) -> None:
        """Read headers and configuration. Raises `ModelError` for a family that is not read."""
        from transformers import AutoConfig, AutoModelForCausalLM

        self.path, self.reader = Path(path), GGUF(Path(path), installed())
        try:
            self.config: Any = AutoConfig.from_pretrained(self.path.parent, gguf_file=str(self.path.resolve()))
        except Exception as error:  # a wrong file fails anywhere in the library
            raise ModelError(f"{path} describes no model that transformers knows: {one_line(error)}") from None
        if self.config.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ModelError(f"{path} holds a model of {self.config.model_type}; of GGUF files, {known} are evaluated")
        scaling = self.reader.file.said(f"{ARCHITECTURES[self.config.model_type]}.rope.scaling.type")
        if scaling not in (None, "none"):
            raise ModelError(
                f"{path} scales its rotary embedding ({scaling}), which is not read; take the model it was made from"
            )
        with torch.device("meta"):
            self.outline: Any = AutoModelForCausalLM.from_config(self.config)
        self.names = tensor_names(self.config, self.outline.state_dict())
        """The tensor of each parameter."""

    def tokenizer(self) -> Any:
        """The tokenizer beside the file, or else in it. Raises `ModelError` if transformers can make none."""
        from transformers import AutoTokenizer

        folder, inside = self.path.parent, {"gguf_file": str(self.path.resolve())}
        beside = any(next(folder.glob(pattern), None) for pattern in TOKENIZERS)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **({} if beside else inside))
        except Exception as error:  # each kind of tokenizer reads other files and raises other errors
            raise ModelError(
                f"transformers cannot make the tokenizer of {self.path} ({one_line(error)}); put the tokenizer.json of "
                f"the model beside the file"
            ) from None

    def layers(self) -> Iterator[Layer]:
        """The packed layers under the names of transformers, those that are read exactly and that multiply."""
        packed = {layer.weight: layer for layer in self.reader.layers if layer.weights is not None}
        for parameter, tensor in self.names.items():
            module = parameter.rpartition(".")[0]
            if tensor in packed and isinstance(self.outline.get_submodule(module), nn.Linear):
                yield dataclasses.replace(packed[tensor], module=module)

    def plain(self) -> list[str]:
        """The linear layers that no quantizer of qsim stands for."""
        packed = {layer.module for layer in self.layers()}
        linear = (name for name, module in self.outline.named_modules() if isinstance(module, nn.Linear))
        return [name for name in linear if name not in packed]

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Scales | None]]:
        """All parameters, dequantized, and the scales of the packed ones. Raises `ModelError` for a missing tensor."""
        layers = {layer.weight: layer for layer in self.reader.layers}
        weights: dict[str, Tensor] = {}
        final: dict[str, Scales | None] = {}
        for parameter, tensor in self.names.items():
            if tensor not in self.reader.tensors:
                raise ModelError(f"{self.path} lacks {tensor}, which is {parameter} in transformers; fetch it again")
            if tensor not in layers:
                values = self.reader.file.dequantized(tensor)
            elif layers[tensor].weights is None:
                values, final[parameter] = self.reader.dequantize(layers[tensor]), None
            else:
                packed = self.reader.read(layers[tensor])
                values, known = packed.dequantize(), packed.known_scales
                final[parameter] = known and Scales(unpaired(parameter, known.scale, self.config), None)
            weights[parameter] = unpaired(parameter, values, self.config)
        return weights, final
