"""Models as llama.cpp has them: the names of their tensors, and the order of the rows of q and k.

The architecture `llama` pairs other channels in the rotary embedding than transformers does, so rows of q and k stand
in another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import ModelError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Families that are read and written, and llama.cpp's names for them."""
OF_EXPERTS = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
"""The families of experts that are read and written."""
WRITTEN = ARCHITECTURES | OF_EXPERTS
"""The families that are written."""
READ = WRITTEN | {
    "phi3": "phi3",
    "starcoder2": "starcoder2",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
}
"""The families that are read."""
NORMS_FROM_ONE = ("gemma2", "gemma3_text")
"""The families whose norms transformers stores without the 1 that llama.cpp adds to their weights."""
EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
"""The stacks of experts of transformers, and the tensors [E, rows, K] that they join."""
STACK = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)(_bias)?")
"""The names of stacks of experts, and of their biases."""
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""The tensors of the embedding and of the output layer; a tied output layer has none of its own."""


def tensor_names(config: Any, parameters: Iterable[str]) -> dict[str, str]:
    """The tensor that holds each parameter of a model. Raises `ModelError` for one that llama.cpp has no name for."""
    import gguf

    architecture = gguf.MODEL_ARCH[READ[config.model_type].upper().replace("-", "_")]
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name in parameters:
        head = name == "lm_head.weight"
        asked = f"{name}.weight" if name.endswith(".sinks") else name
        translated = HEAD if head else known.get_name(asked, try_suffixes=(".weight", ".bias"))
        if translated is None:
            raise ModelError(f"gguf has no name for {name} in a model of {config.model_type}")
        found[name] = EMBEDDING if translated == HEAD and config.tie_word_embeddings else translated
    return found


def tensors_of(config: Any, parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The tensors that each parameter of a model joins. Raises `ModelError` as `tensor_names` does."""
    names = list(parameters)
    single = tensor_names(config, (name for name in names if STACK.fullmatch(name) is None))
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        stack = STACK.fullmatch(name)
        if stack is None:
            found[name] = (single[name],)
        else:
            last = "bias" if stack[3] else "weight"
            found[name] = tuple(f"blk.{stack[1]}.{tensor}.{last}" for tensor in EXPERTS[stack[2]])
    return found


def joined(name: str, parts: list[Tensor], config: Any) -> Tensor:
    """The rows of a parameter, of those of the tensors that it joins: one below the other, or by turns in gpt-oss."""
    if len(parts) == 1:
        return parts[0]
    if config.model_type == "gpt_oss":
        return torch.stack(parts, 2).flatten(1, 2)
    return torch.cat(parts, -2)


def is_transposed(name: str, config: Any) -> bool:
    """Tell if transformers stores a stack of experts as [E, K, rows]."""
    stack = STACK.fullmatch(name)
    return stack is not None and not stack[3] and config.model_type == "gpt_oss"


def parts_of_stack(name: str) -> int:
    """The projections that a stack of experts joins, one below the other; 1 for any other weight."""
    stack = STACK.fullmatch(name)
    return 1 if stack is None else len(EXPERTS[stack[2]])


def paired(name: str, rows: Tensor, config: Any) -> Tensor:
    """The rows of a parameter of transformers in llama.cpp's order."""
    heads = _heads(name, config)
    return rows if not heads else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def unpaired(name: str, rows: Tensor, config: Any) -> Tensor:
    """The rows of a tensor of llama.cpp in the order of transformers' parameter of this name."""
    heads = _heads(name, config)
    return rows if not heads else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _heads(name: str, config: Any) -> int:
    """The number of heads of a parameter whose rows are paired; 0 for any other parameter."""
    if READ[config.model_type] != "llama":
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return int(heads.get(name.rpartition(".")[0].rpartition(".")[2], 0))
