"""Tiny models of the families, seeded, and tokens for them; the plugins' tests use them too."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _opt(attention: str = "eager", **options: Any) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0} | options)
    return OPTForCausalLM._from_config(config, attn_implementation=attention)


def _opt_350m(attention: str = "eager") -> Any:
    return _opt(attention, word_embed_proj_dim=32, do_layer_norm_before=False)


def _llama(attention: str = "eager") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def _gpt2(attention: str = "eager") -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def _codegen(attention: str = "eager") -> Any:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    sizes = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    config = CodeGenConfig(**sizes, bos_token_id=0, eos_token_id=0)
    if not CodeGenForCausalLM._supports_sdpa:  # transformers 5.0
        attention = "eager"
    return CodeGenForCausalLM._from_config(config, attn_implementation=attention)


FAMILIES: dict[str, Callable[..., Any]] = {
    "opt": _opt,
    "opt-350m": _opt_350m,
    "llama": _llama,
    "gpt2": _gpt2,
    "codegen": _codegen,
}


def make(family: str, attention: str = "eager") -> Any:
    """`make("llama", "sdpa")`: a copy of a tiny model, biases and norms random too, in eval mode."""
    return copy.deepcopy(_made(family, attention))


@functools.cache
def _made(family: str, attention: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family](attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()


def save_small(folder: Path) -> Path:
    """Save an OPT of two layers with random weights and the tokenizer of opt-tiny, for commands that take a directory."""
    from qsim_zoo import trained

    shutil.copytree(trained("opt-tiny"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _opt(vocab_size=2048, max_position_embeddings=256).save_pretrained(folder)
    return folder


def tokens(seed: int = 1) -> Tensor:
    """Two sequences of sixteen tokens."""
    return torch.randint(5, 90, (2, 16), generator=torch.Generator().manual_seed(seed))
