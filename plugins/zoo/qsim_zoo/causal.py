"""Language models that predict the next token: OPT in four sizes, and the shapes of CodeGen, Llama, Qwen3 and Phi."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2TokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qsim_zoo.task import Task
from qsim_zoo.text import source, text

VOCABULARY = 2048


class Causal(Task):
    """Trains a causal language model on random windows of text, with a byte-level BPE fitted to the train split."""

    measure = "validation_perplexity"
    special: ClassVar[dict[str, str]]
    """The tokenizer's special tokens by role."""
    special_tokens: ClassVar[list[str]]
    """The special tokens in the order of their ids."""
    context: int = 256
    batch: int = 16

    @staticmethod
    @abstractmethod
    def text(split: str) -> str:
        """Return the text of one split."""

    def prepare(self, directory: Path) -> None:
        """Fit the tokenizer, and tokenize both splits."""
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            [self.text("train")], vocab_size=VOCABULARY, special_tokens=self.special_tokens, show_progress=False
        )
        directory.mkdir(parents=True, exist_ok=True)
        bpe.save(str(directory / "tokenizer.json"))
        tokenizer = GPT2TokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"), model_max_length=self.context, **self.special
        )
        tokenizer.save_pretrained(directory)
        self.train_tokens, self.valid_tokens = (
            torch.tensor(tokenizer(self.text(split), verbose=False).input_ids) for split in ("train", "valid")
        )

    def loss(self, model: Any) -> Tensor:
        """Compute the mean negative log-likelihood per token of random windows."""
        starts = torch.randint(len(self.train_tokens) - self.context, (self.batch,)).tolist()
        batch = torch.stack([self.train_tokens[start : start + self.context] for start in starts])
        loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def validate(self, model: Any) -> float:
        """Compute the mean negative log-likelihood per token over non-overlapping windows."""
        tokens = self.valid_tokens[: len(self.valid_tokens) // self.context * self.context]
        windows = tokens.view(-1, self.context)
        losses = [model(input_ids=w, labels=w, use_cache=False).loss.item() * len(w) for w in windows.split(self.batch)]
        return float(sum(losses) / len(windows))


class Opt(Causal):
    """OPT, initialised as in its paper, on Python's documentation."""

    width: ClassVar[int]
    layers: ClassVar[int] = 4
    heads: ClassVar[int] = 4
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>"]  # with OPT's ids
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    left_out = ("lm_head.weight",)
    text = staticmethod(text)

    def make(self) -> nn.Module:
        model: nn.Module = OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=self.width,
                word_embed_proj_dim=self.width,
                ffn_dim=4 * self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                max_position_embeddings=self.context,
                dropout=0.1,
                pad_token_id=1,
                bos_token_id=2,
                eos_token_id=2,
            )
        )
        return model


class OptTiny(Opt):
    """OPT with 4 layers of width 256 (3.7 million parameters)."""

    name = "opt-tiny"
    steps = 3000
    peak_rate = 1.5e-3
    width = 256


class Opt1M(Opt):
    """OPT with 3 layers of width 128 (0.9 million parameters)."""

    name = "opt-1m"
    steps = 2000
    peak_rate = 2e-3
    width = 128
    layers = 3


class Opt2M(Opt):
    """OPT with 4 layers of width 192 (2.2 million parameters)."""

    name = "opt-2m"
    steps = 2000
    peak_rate = 2e-3
    width = 192


class Opt14M(Opt):
    """OPT with 4 layers of width 512 (13.8 million parameters)."""

    name = "opt-14m"
    steps = 1000
    peak_rate = 1e-3
    width = 512
    heads = 8


class CodegenTiny(Causal):
    """CodeGen with 4 layers of width 128 (1.3 million parameters): attention beside the MLP, rotary positions."""

    name = "codegen-tiny"
    steps = 2000
    peak_rate = 2e-3
    batch = 8
    special_tokens = ["<|endoftext|>"]
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    text = staticmethod(source)

    def make(self) -> nn.Module:
        model: nn.Module = CodeGenForCausalLM(
            CodeGenConfig(
                vocab_size=VOCABULARY,
                n_positions=self.context,
                n_ctx=self.context,
                n_embd=128,
                n_layer=4,
                n_head=4,
                rotary_dim=16,
                bos_token_id=0,
                eos_token_id=0,
                tie_word_embeddings=False,
            )
        )
        return model


class Shaped(Causal):
    """A decoder of 4 layers of width 128 with the shapes of a newer family, on Python's documentation."""

    steps = 1500
    peak_rate = 2e-3
    batch = 8
    special_tokens = ["<|endoftext|>"]
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    text = staticmethod(text)

    def shape(self, feed_forward: int) -> dict[str, Any]:
        """Return the settings that the families share, with the width of the feed-forward layers."""
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": feed_forward,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": self.context,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": False,
        }


class LlamaTiny(Shaped):
    """Llama: gated feed-forward layers, grouped-query attention, RMSNorm."""

    name = "llama-tiny"

    def make(self) -> nn.Module:
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**self.shape(320), num_key_value_heads=2))
        return model


class Qwen3Tiny(Shaped):
    """Qwen3: Llama's shape with a norm of queries and of keys in each head."""

    name = "qwen3-tiny"

    def make(self) -> nn.Module:
        model: nn.Module = Qwen3ForCausalLM(Qwen3Config(**self.shape(320), num_key_value_heads=2, head_dim=32))
        return model


class PhiTiny(Shaped):
    """Phi: attention beside the feed-forward layers after one LayerNorm, and rotary positions for half of a head."""

    name = "phi-tiny"

    def make(self) -> nn.Module:
        model: nn.Module = PhiForCausalLM(PhiConfig(**self.shape(512), partial_rotary_factor=0.5))
        return model
