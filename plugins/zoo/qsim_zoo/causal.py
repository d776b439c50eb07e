"""Language models that predict the next token: opt-tiny on documentation, codegen-tiny on source code."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import CodeGenConfig, CodeGenForCausalLM, GPT2TokenizerFast, OPTConfig, OPTForCausalLM

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


class OptTiny(Causal):
    """OPT with 4 layers of width 256 (3.8 million parameters), initialised as in its paper."""

    name = "opt-tiny"
    steps = 3000
    peak_rate = 1.5e-3
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>"]  # with OPT's ids
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    left_out = ("lm_head.weight",)
    text = staticmethod(text)

    def make(self) -> nn.Module:
        model: nn.Module = OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=256,
                word_embed_proj_dim=256,
                ffn_dim=1024,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=self.context,
                dropout=0.1,
                pad_token_id=1,
                bos_token_id=2,
                eos_token_id=2,
            )
        )
        return model


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
