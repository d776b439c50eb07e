"""Complete prompts with a causal model: sampling with counter-based random numbers, and texts that end completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsim_core import LoadedModel
from qsim_core.formats.random_bits import at, uniform
from qsim_evaluators.asking import arguments, logits
from qsim_evaluators.fitting import device

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Texts that show the end of a function (Chen et al., arXiv 2107.03374, section 3.2)."""


@dataclass(frozen=True)
class Sampling:
    """Options of drawing tokens. A temperature of 0 takes the likeliest token."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int


def complete(
    loaded: LoadedModel, prompt: Tensor, many: int, sampling: Sampling, site: str, batch_size: int
) -> list[str]:
    """Return `many` completions of one prompt `[tokens]`, each up to the first stop.

    A batch has only one prompt, so prompts are not padded. Finished completions get pad tokens until the others end. A
    completion depends on the seed, on `site` and on its number. It does not depend on the batch or on torch's global
    random state.
    """
    written = []
    for first in range(0, many, batch_size):
        rows = range(first, min(first + batch_size, many))
        written += _batch(loaded, prompt.to(device(loaded)), rows, sampling, site)
    return written


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """Return the text before the first stop."""
    return text[: min((place for end in stop if (place := text.find(end)) >= 0), default=len(text))]


def _batch(loaded: LoadedModel, prompt: Tensor, rows: range, sampling: Sampling, site: str) -> list[str]:
    from transformers import (
        LogitsProcessorList,
        StoppingCriteriaList,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    ends = _end_tokens(loaded)
    pad = next((token for token in (getattr(loaded.tokenizer, "pad_token_id", None), *ends) if token is not None), 0)

    def decode(tokens: list[int]) -> str:
        return loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[no-any-return]

    before = decode(prompt.tolist())

    def texts(tokens: Tensor) -> list[str]:
        """Return the text that each row adds to the prompt.

        Prompt and completion are decoded together, because a tokenizer may decode a first token differently.
        """
        return [decode(row)[len(before) :] for row in _cut_at_end(tokens.tolist(), len(prompt), ends)]

    def stopped(tokens: Tensor, scores: Any, **options: Any) -> Tensor:
        found = [before_stop(text, sampling.stop) != text for text in texts(tokens)]
        return torch.tensor(found, device=tokens.device)

    def drawn(tokens: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.stack(
            [gumbel(scores[0], f"{site} {row}", tokens.shape[1] - len(prompt), sampling.seed) for row in rows]
        )

    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors = LogitsProcessorList(
            [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p), drawn]
        )
    batch = prompt.expand(len(rows), -1)
    if not hasattr(loaded.model, "generate"):
        tokens = _written_out(loaded, batch, processors, stopped, sampling.max_new_tokens, ends, pad)
    else:
        tokens = loaded.model.generate(  # type: ignore[operator]
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            generation_config=_configuration(sampling, ends, pad),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
    return [before_stop(text, sampling.stop) for text in texts(tokens)]


def _written_out(
    loaded: LoadedModel, tokens: Tensor, processors: Any, stopped: Any, most: int, ends: list[int], pad: int
) -> Tensor:
    """Do what `generate` does with a model that has logits alone: each new token takes a forward of the whole text."""
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(most):
        scores = logits(loaded, arguments(loaded, {"input_ids": tokens, "use_cache": False}))[:, -1].float()
        chosen = processors(tokens, scores).argmax(-1).masked_fill(ended, pad)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        ended |= stopped(tokens, None) | torch.isin(chosen, torch.tensor(ends, device=tokens.device))
        if ended.all():
            break
    return tokens


def _configuration(sampling: Sampling, ends: list[int], pad: int) -> Any:
    """Set every option, so that the checkpoint's own options do not apply. The processor `drawn` draws the tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, num_beams=1, temperature=1.0, top_k=50, top_p=1.0,
        repetition_penalty=1.0, eos_token_id=ends or None, pad_token_id=pad,
    )  # fmt: skip


def gumbel(like: Tensor, site: str, step: int, seed: int) -> Tensor:
    """Gumbel noise in float64: the argmax of logits plus it is a draw from their softmax.

    See Maddison, Tarlow and Minka, "A* sampling", NeurIPS 2014, section 2.
    """
    with at(site, step):
        return -(uniform(like, seed).double() + 2.0**-25).log().neg().log()


def _end_tokens(loaded: LoadedModel) -> list[int]:
    """Return the tokens that end a text: the checkpoint's, or the tokenizer's if the checkpoint has none."""
    ends = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    ends = getattr(loaded.tokenizer, "eos_token_id", None) if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _cut_at_end(rows: list[list[int]], start: int, ends: list[int]) -> list[list[int]]:
    """Cut rows off at their first end token from `start` on."""
    return [row[: next((i for i in range(start, len(row)) if row[i] in ends), len(row))] for row in rows]
