"""Which evaluator fits which model, by what the model's class is called."""

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
"""Ends of class names, the narrowest first; of two evaluators for one class the first is the one that is made for it.
A class of another name is taken at its word."""
NEEDS = {
    "perplexity": ("tokenizer", "a tokenizer"),
    "pass_at_k": ("tokenizer", "a tokenizer"),
    "masked_lm": ("tokenizer", "a tokenizer"),
    "question_answering": ("tokenizer", "a tokenizer"),
    "denoising": ("processor", "a scheduler"),
    "frechet": ("processor", "a scheduler"),
    "retrieval": ("tokenizer", "a tokenizer"),
}
"""What an evaluator cannot do without: the field of a loaded model, and what it is called."""


def check(evaluator: str, loaded: LoadedModel) -> None:
    """Raise `DataError`, saying what fits, unless an evaluator can be used on a model."""
    name, fit = type(loaded.model).__name__, fitting(loaded)
    if fit and evaluator not in fit:
        raise DataError(f"{evaluator} does not fit {with_article(name)}; {', '.join(fit)} and fidelity do")
    need(evaluator, loaded, *NEEDS.get(evaluator, ("model", "")))


def need(evaluator: str, loaded: LoadedModel, field: str, called: str) -> None:
    """Raise `DataError` for what an evaluator cannot do without, if the model was loaded without it."""
    if getattr(loaded, field) is None:
        raise DataError(f"{evaluator} needs {called}, and this {type(loaded.model).__name__} was loaded without one")


def best(loaded: LoadedModel) -> str | None:
    """The evaluator that is made for a model like this, if its class tells."""
    return next(iter(fitting(loaded)), None)


def fitting(loaded: LoadedModel) -> list[str]:
    """Every evaluator that is made for a model like this, the one of its field first."""
    return [evaluator for evaluator, ends in FITS.items() if type(loaded.model).__name__.endswith(ends)]


def device(loaded: LoadedModel) -> torch.device:
    """Where the model computes."""
    return computes_on(loaded.model)


def dtype(loaded: LoadedModel) -> torch.dtype:
    """In what it computes."""
    return next(loaded.model.parameters()).dtype


def longest(loaded: LoadedModel, otherwise: int) -> int:
    """How many tokens the model takes."""
    config: Any = loaded.model.config
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or otherwise)
