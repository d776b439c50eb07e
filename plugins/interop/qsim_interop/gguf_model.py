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
from qsim_interop.llama_cpp import (
    EMBEDDING,
    NORMS_FROM_ONE,
    READ,
    STACK,
    is_transposed,
    joined,
    tensors_of,
    unpaired,
)
from qsim_interop.reading.formats.gguf_file import GGUF
from qsim_interop.reading.packed_weight import Layer
from qsim_interop.reading.recipe import recipe_of
from qsim_interop.stored import StoredQuantization

FREQUENCIES = "rope_freqs.weight"
"""The tensor with the numbers by which llama.cpp divides the frequencies of the rotary embedding, as Llama 3.1 has."""

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""The factors of `longrope`, for texts beyond the original length, and for those up to it."""
SCALINGS = ("linear", "yarn")
"""The scalings of the rotary embedding that are read."""
KEYS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Keys of a file, and the options of transformers that they are."""


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
            self.config: Any = self._described() or AutoConfig.from_pretrained(
                self.path.parent, gguf_file=str(self.path.resolve())
            )
        except Exception as error:  # a wrong file fails anywhere in the library
            raise ModelError(f"{path} describes no model that transformers knows: {one_line(error)}") from None
        if self.config.model_type not in READ:
            known = ", ".join(READ)
            raise ModelError(f"{path} holds a model of {self.config.model_type}; of GGUF files, {known} are evaluated")
        self._complete()
        with torch.device("meta"):
            self.outline: Any = AutoModelForCausalLM.from_config(self.config)
        self.packed = {layer.weight: layer for layer in self.reader.layers}
        self.names = tensors_of(self.config, self.outline.state_dict())
        """The tensors of each parameter."""

    def _described(self) -> Any:
        """The configuration of gpt-oss, whose scaled rotary embedding transformers 5.24 cannot read; else None."""
        from transformers import AutoConfig
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        said = self.reader.file.said
        if said("general.architecture") != "gpt-oss":
            return None
        keys = {option: said(f"gpt-oss.{key}") for key, option in GGUF_CONFIG_MAPPING["gpt_oss"].items() if option}
        keys |= {f"{token}_token_id": said(f"tokenizer.ggml.{token}_token_id") for token in ("bos", "eos")}
        return AutoConfig.for_model("gpt_oss", **{key: value for key, value in keys.items() if value is not None})

    def _complete(self) -> None:
        """Put into the configuration what llama.cpp reads or computes, and transformers does not read of the file."""
        config = self.config
        for key, option in KEYS.items():
            if hasattr(config, option) and self._said(key) is not None:
                setattr(config, option, self._said(key))
        config.vocab_size = self.reader.tensors[EMBEDDING].shape[0] if EMBEDDING in self.reader.tensors else 0
        if (config.pad_token_id or 0) >= config.vocab_size:  # the default of another vocabulary
            config.pad_token_id = None
        if config.model_type in NORMS_FROM_ONE:
            of_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[config.model_type]
            heads = config.hidden_size // config.num_attention_heads
            config.query_pre_attn_scalar = heads if of_27b else config.head_dim
        self._complete_rotary(config.rope_parameters.get("full_attention", config.rope_parameters))

    def _complete_rotary(self, rope: dict[str, Any]) -> None:
        """Put into the parameters of the rotary embedding what the file says. Gemma 3 scales some layers alone.

        Raises `ModelError` for a scaling that is not read.
        """
        if (base := self._said("rope.freq_base")) is not None:
            rope["rope_theta"] = base
        if self.config.model_type == "phi3" and (dims := self._said("rope.dimension_count")) is not None:
            rope["partial_rotary_factor"] = dims / (self.config.hidden_size // self.config.num_attention_heads)
        kind, factor, original = (
            self._said(f"rope.scaling.{key}") for key in ("type", "factor", "original_context_length")
        )
        by_tensor = next((name for name in self.reader.tensors if name.startswith("rope_factors")), None)
        if kind in (None, "none") and by_tensor is None:
            for key in rope.keys() - {"rope_theta", "partial_rotary_factor"}:  # the defaults of a family that scales
                del rope[key]
            rope["rope_type"] = "default"
            return
        if by_tensor is not None and {LONG, SHORT} <= self.reader.tensors.keys() and original is not None:
            rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
            rope |= {"long_factor": self._numbers(LONG), "short_factor": self._numbers(SHORT)}
            if (attention := self._said("rope.scaling.attn_factor")) is not None:
                rope["attention_factor"] = attention
            self.config.original_max_position_embeddings = original
            return
        if kind not in SCALINGS or factor is None or by_tensor is not None:
            raise ModelError(
                f"{self.path} scales its rotary embedding ({by_tensor or kind}); {' and '.join(SCALINGS)}, with a "
                f"factor, are read: take the model it was made from"
            )
        rope |= {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original or int(self.config.max_position_embeddings / factor)

    def _numbers(self, tensor: str) -> list[float]:
        """The values of a tensor."""
        found: list[float] = self.reader.tensors.read(tensor).float().tolist()
        return found

    def _said(self, key: str) -> Any:
        """The value of a key of the architecture; None: the file has no such key."""
        return self.reader.file.said(f"{READ[self.config.model_type]}.{key}")

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
        for parameter, tensors in self.names.items():
            module = parameter if STACK.fullmatch(parameter) else parameter.rpartition(".")[0]
            multiplies = module == parameter or isinstance(self.outline.get_submodule(module), nn.Linear)
            quantizers = {packed[tensor].weights if tensor in packed else None for tensor in tensors}
            if multiplies and len(quantizers) == 1 and tensors[0] in packed:
                yield dataclasses.replace(packed[tensors[0]], module=module)

    def plain(self) -> list[str]:
        """The linear layers that no quantizer of qsim stands for."""
        packed = {layer.module for layer in self.layers()}
        linear = (name for name, module in self.outline.named_modules() if isinstance(module, nn.Linear))
        return [name for name in linear if name not in packed]

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Scales | None]]:
        """All parameters, dequantized, and the scales of the packed ones. Raises `ModelError` for a missing tensor."""
        weights: dict[str, Tensor] = {}
        final: dict[str, Scales | None] = {}
        shapes = {name: tensor.shape for name, tensor in self.outline.state_dict().items()}
        for parameter, tensors in self.names.items():
            parts = [self._read(tensor, parameter) for tensor in tensors]
            values = joined(parameter, [part for part, _, _ in parts], self.config)
            if is_transposed(parameter, self.config):
                values = values.transpose(1, 2).contiguous()
            if self.config.model_type in NORMS_FROM_ONE and parameter.endswith("norm.weight"):
                values = values - 1
            weights[parameter] = unpaired(parameter, values, self.config).reshape(shapes[parameter])
            if any(is_packed for _, is_packed, _ in parts):
                known = [scales for _, _, scales in parts if scales is not None]
                whole = len(known) == len(parts) and _alike(known)
                stacked = joined(parameter, known, self.config) if whole else None
                rows = None if stacked is None else unpaired(parameter, stacked.flatten(0, -2), self.config)
                final[parameter] = None if rows is None else Scales(rows, None)
        return weights, final

    def _read(self, tensor: str, parameter: str) -> tuple[Tensor, bool, Tensor | None]:
        """The values of a tensor, true if it is packed, and its scales [rows, B] or [E, rows, B] as far as known."""
        if tensor not in self.reader.tensors:
            raise ModelError(f"{self.path} lacks {tensor}, which is {parameter} in transformers; fetch it again")
        layer, shape = self.packed.get(tensor), self.reader.tensors[tensor].shape
        if layer is None:
            return self.reader.file.dequantized(tensor).float(), False, None
        if layer.weights is None:
            return self.reader.dequantize(layer).reshape(shape), True, None
        packed = self.reader.read(layer)
        known = packed.known_scales
        scales = None if known is None else known.scale.reshape(*shape[:-1], -1)
        return packed.dequantize().reshape(shape), True, scales


def _alike(parts: list[Tensor]) -> bool:
    """Tell if parts have scales of as many blocks."""
    return len({part.shape[-1] for part in parts}) == 1
