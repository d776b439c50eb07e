"""Choose evaluators for a model by the name of the model's class."""

from __future__ import annotations

from typing import Any

import torch

from qsim_core import DataError, LoadedModel
from qsim_core.errors import with_article
from qsim_core.transforms.offload import computes_on

FITS = {
    "perplexity": ("ForCausalLM", "LMHeadModel"),
    "pass_at_k": ("ForCausalLM", "LMHeadModel"),
    "masked_lm": ("ForMaskedLM",),
    "accuracy": ("ForImageClassification", "ForSequenceClassification"),
    "question_answering": ("ForQuestionAnswering",),
    "denoising": ("UNet2DModel",),
    "frechet": ("UNet2DModel",),
    "retrieval": ("BertModel", "AlbertModel", "RobertaModel", "MPNetModel", "ElectraModel"),
}
"""Endings of class names for each evaluator. Of two evaluators for one class, the first is the default.

A model whose class has another name may be used with every evaluator."""
NEEDS = {
    "perplexity": ("tokenizer", "a tokenizer"),
    "pass_at_k": ("tokenizer", "a tokenizer"),
    "masked_lm": ("tokenizer", "a tokenizer"),
    "question_answering": ("tokenizer", "a tokenizer"),
    "denoising": ("processor", "a scheduler"),
    "frechet": ("processor", "a scheduler"),
    "retrieval": ("tokenizer", "a tokenizer"),
}
"""The part of a loaded model that an evaluator needs: the name of its field, and its name in messages."""

MAXIMUM = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")
"""Names that configurations have for the number of positions."""


def check(evaluator: str, loaded: LoadedModel) -> None:
    """Raise `DataError` if an evaluator does not fit a model; the message lists evaluators that fit."""
    name, fit = type(loaded.model).__name__, fitting(loaded)
    if fit and evaluator not in fit:
        raise DataError(f"{evaluator} does not fit {with_article(name)}; {', '.join(fit)} and fidelity do")
    require(evaluator, loaded, *NEEDS.get(evaluator, ("model", "")))


def require(evaluator: str, loaded: LoadedModel, field: str, called: str) -> None:
    """Raise `DataError` if the model was loaded without a part that the evaluator needs."""
    if getattr(loaded, field) is None:
        raise DataError(f"{evaluator} needs {called}, and this {type(loaded.model).__name__} was loaded without one")


def default_evaluator(loaded: LoadedModel) -> str | None:
    """Return the default evaluator for a model; None if its class is unknown."""
    return next(iter(fitting(loaded)), None)


def fitting(loaded: LoadedModel) -> list[str]:
    """List the evaluators for a model, the default first; empty if its class is unknown."""
    return [evaluator for evaluator, ends in FITS.items() if type(loaded.model).__name__.endswith(ends)]


def device(loaded: LoadedModel) -> torch.device:
    """Return the device on which the model computes."""
    return computes_on(loaded.model)


def dtype(loaded: LoadedModel) -> torch.dtype:
    """Return the dtype in which the model computes."""
    return next(loaded.model.parameters()).dtype


def vocabulary(loaded: LoadedModel) -> int | None:
    """Return the number of tokens of the model's vocabulary; None if its configuration has none."""
    whole: Any = getattr(loaded.model, "config", None)
    text = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    found = getattr(text, "vocab_size", None)
    return found if isinstance(found, int) and found > 0 else None


def longest(loaded: LoadedModel, otherwise: int) -> int:
    """Return the number of tokens that the model takes at most, or `otherwise` if its configuration has none.

    A table of positions may have rows that no token takes: those of RoBERTa begin after the padding token's.
    """
    whole: Any = getattr(loaded.model, "config", None)
    config = whole.get_text_config() if hasattr(whole, "get_text_config") else getattr(whole, "text_config", whole)
    known = (getattr(config, name, None) for name in MAXIMUM)
    most = next((n for n in known if isinstance(n, int) and n > 0), None)
    if most is None:
        return otherwise
    unused = (
        int(table.padding_idx) + 1
        for name, table in loaded.model.named_modules()
        if "position" in name.rpartition(".")[2] and getattr(table, "padding_idx", None) is not None
        if any(len(values) == most for values in (*table.parameters(), *table.buffers()) if values.dim() == 2)
    )
    return most - max(unused, default=0)
