"""bert-tiny: a masked language model on documentation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from qsim_zoo.task import Task
from qsim_zoo.text import text

VOCABULARY = 2048
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, _, CLS, SEP, MASK = range(5)
SHARE = 0.15
"""Share of the tokens that the model has to predict, as in BERT (arXiv 1810.04805)."""


def letters(words: str) -> list[str]:
    """List every letter that occurs at the beginning of a word or inside one, in sorted order.

    Given to the fit as special tokens, the letters have the same ids each time. Otherwise each fit would number them
    differently, and would break ties differently.
    """
    normal = BertNormalizer().normalize_str(words)
    found = {word for word, _ in BertPreTokenizer().pre_tokenize_str(normal)}
    return sorted({word[0] for word in found} | {f"##{letter}" for word in found for letter in word[1:]})


def waves(positions: int, width: int) -> Tensor:
    """Compute sines and cosines of each position (arXiv 1706.03762). Starting from them, training takes fewer steps."""
    angles = torch.arange(positions)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angles.sin(), angles.cos()], 1)


class BertTiny(Task):
    """BERT with 4 layers of width 128 (1.1 million parameters) and its masked language model's head.

    The embeddings of positions are trained, and start as sines and cosines.
    """

    name = "bert-tiny"
    steps = 6000
    measure = "validation_perplexity_of_masked_tokens"
    peak_rate = 2e-3
    warmup = 200
    context: int = 64
    batch: int = 16
    left_out = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")

    def prepare(self, directory: Path) -> None:
        """Fit a lower-case WordPiece tokenizer, and tokenize both splits."""
        pieces = BertWordPieceTokenizer()
        pieces.train_from_iterator(
            [text("train")],
            vocab_size=VOCABULARY,
            special_tokens=[*SPECIAL, *letters(text("train"))],
            show_progress=False,
        )
        tokenizer = BertTokenizer(vocab=pieces.get_vocab(), model_max_length=self.context)
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(directory)
        self.train_tokens, self.valid_tokens = (
            torch.tensor(tokenizer(text(split), add_special_tokens=False, verbose=False).input_ids)
            for split in ("train", "valid")
        )

    def make(self) -> nn.Module:
        model: Any = BertForMaskedLM(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=self.context,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=PAD,
            )
        )
        positions = model.bert.embeddings.position_embeddings
        with torch.no_grad():
            positions.weight.copy_(waves(*positions.weight.shape) * model.config.initializer_range * math.sqrt(2))
        made: nn.Module = model
        return made

    def loss(self, model: Any) -> Tensor:
        """Compute the mean negative log-likelihood of the masked tokens of random windows."""
        length = self.context - 2
        starts = torch.randint(len(self.train_tokens) - length, (self.batch,)).tolist()
        return self._loss(model, torch.stack([self.train_tokens[start : start + length] for start in starts]))

    def validate(self, model: Any) -> float:
        """Compute the same over non-overlapping windows, with the same masks in each call."""
        length = self.context - 2
        windows = self.valid_tokens[: len(self.valid_tokens) // length * length].view(-1, length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            losses = [self._loss(model, w).item() * len(w) for w in windows.split(self.batch)]
        return float(sum(losses) / len(windows))

    def _loss(self, model: Any, windows: Tensor) -> Tensor:
        """Compute the loss. Of ten tokens to predict, eight are masked, one is replaced and one stays, as in BERT."""
        to_guess = torch.rand(windows.shape) < SHARE
        how = torch.rand(windows.shape)
        seen = torch.where(to_guess & (how < 0.8), MASK, windows)
        seen = torch.where(to_guess & (how >= 0.9), torch.randint(len(SPECIAL), VOCABULARY, windows.shape), seen)
        ends = torch.full((len(windows), 1), CLS), torch.full((len(windows), 1), SEP)
        labels = nn.functional.pad(torch.where(to_guess, windows, -100), (1, 1), value=-100)
        loss: Tensor = model(input_ids=torch.cat([ends[0], seen, ends[1]], 1), labels=labels).loss
        return loss
