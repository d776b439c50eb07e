"""`perplexity(seqlen, stride)`: perplexity of a causal language model per token, word and byte."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.evaluation.metrics import Means
from qsim_evaluators.asking import arguments, logits
from qsim_evaluators.fitting import check, device, longest, vocabulary
from qsim_evaluators.text import (
    cut_windows,
    draw_windows,
    opened,
    read_text,
    split_opening,
    tokens_of,
    tokens_of_corpus,
)

LONGEST = 2048
PIECE = 2**24
"""Logits of which log-probabilities are computed at a time."""
LOGITS = 2**28
"""Logits that a forward makes at most, if it has more than one window: 1 GiB in float32."""


class Perplexity(Evaluator):
    """exp of the mean negative log-likelihood per predicted token, over windows of the whole text.

    The text is tokenized in one piece and cut into windows of `seqlen` tokens, one every `stride` tokens. A remainder
    that fills no window is dropped. The first token of a window is only context. Where the tokenizer puts a token
    before a text, each window begins with it, as some models predict nothing without it. By default `stride` equals
    `seqlen`: with `first_token=false` this is the protocol of GPTQ's evaluation (arXiv 2210.17323). With a smaller
    stride, only the last `stride` tokens of each later window count. Log-probabilities are computed in float32 and
    summed in float64.

    Perplexity per word and per byte follow lm-eval: words are separated by white space, bytes are those of UTF-8. They
    do not depend on the tokenizer. Tokens that are not predicted count with the mean of the others.

    A forward has fewer windows than the batch size where their logits would exceed 2^28, one at least. This is of
    consequence for a scale that is shared over the batch.
    """

    name = "perplexity"
    metric = "perplexity"
    seqlen: PositiveInt | None = Field(None, description="tokens of a window; none: the model's maximum, 2048 at most")
    stride: PositiveInt | None = Field(None, description="tokens from one window to the next; none: seqlen")
    first_token: bool = Field(True, description="begin each window with what the tokenizer puts before a text")

    @model_validator(mode="after")
    def _fits(self) -> Perplexity:
        if self.seqlen is not None and self.seqlen < 2:
            raise ValueError(f"a window of {self.seqlen} token has no token to predict; seqlen is at least 2")
        if self.seqlen is not None and self.stride is not None and self.stride > self.seqlen:
            raise ValueError(f"a stride of {self.stride} would leave tokens out between windows of {self.seqlen}")
        return self

    def read(self, source: str, split: str = "test") -> Data:
        """Read text from a file, or from `datasets`: `NAME[:CONFIG[:SPLIT]]` or a directory of data files."""
        return read_text(source, "perplexity", split)

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Draw `samples` windows of `length` tokens at random places of the text, one in a batch, as GPTQ does."""
        length, most = length or self._sizes(loaded)[0], longest(loaded, LONGEST)
        if not 2 <= length <= most:
            raise DataError(f"calibration windows of {length} tokens: the model takes 2 to {most}")
        opening, tokens = self._tokens(loaded, data)
        windows = draw_windows(tokens, samples, length - len(opening), seed, data.name)
        return [_inputs(loaded, opened(opening, window)) for window in windows]

    def training(self, loaded: LoadedModel, data: Data, length: int | None) -> list[dict[str, Tensor]]:
        """Cut the text into non-overlapping windows. The model has to predict each token except the first."""
        length, most = length or self._sizes(loaded)[0], longest(loaded, LONGEST)
        if not 2 <= length <= most:
            raise DataError(f"training windows of {length} tokens: the model takes 2 to {most}")
        opening, tokens = self._tokens(loaded, data)
        windows = opened(opening, cut_windows(tokens, length - len(opening), data.name))
        return [{"input_ids": window, "labels": window} for window in windows]

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return the first window, without a cache."""
        windows, _ = self._windows(loaded, *self._tokens(loaded, data), data.name)
        return _inputs(loaded, windows[:1])

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute perplexities per token, word and byte, `nll` (nats per token), `bits_per_byte`, and `tokens`."""
        opening, text_tokens = self._tokens(loaded, data)
        windows, stride = self._windows(loaded, opening, text_tokens, data.name)
        at_once = min(run.batch_size, _most_windows(loaded, windows.shape[1]))
        batches = list(enumerate(windows[: run.limit].split(at_once)))

        def sums(numbered: tuple[int, Tensor]) -> Tensor:
            place, batch = numbered
            losses = _losses(loaded, batch)[:, max(len(opening) - 1, 0) :]
            fresh = losses[:, -min(stride, losses.shape[1]) :]
            total, count = fresh.sum(1), torch.full((len(batch),), float(fresh.shape[1]), dtype=torch.float64)
            if place == 0:  # only the first window contains the first tokens
                total[0], count[0] = losses[0].sum(), losses.shape[1]
            return torch.stack([total, count])

        with torch.no_grad():
            lost, tokens = run.over(batches, sums, "perplexity")
        words, letters = len(re.split(r"\s+", data.content)), len(data.content.encode())

        def metrics(means: Means) -> Means:
            nll = means["nll"] / means["tokens"]
            per_byte = nll * (len(text_tokens) / letters)
            return {
                "perplexity": nll.exp(),
                "nll": nll,
                "word_perplexity": (nll * (len(text_tokens) / words)).exp(),
                "byte_perplexity": per_byte.exp(),
                "bits_per_byte": per_byte / math.log(2),
            }

        counts = {"tokens": float(tokens.sum())}
        return Metrics({"nll": lost, "tokens": tokens}, metrics, counts=counts, in_order=True)

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe the windows and the stride in words."""
        seqlen, stride = self._sizes(loaded)
        cut = "non-overlapping" if stride == seqlen else f"stride {stride}"
        begun = ""
        if loaded.tokenizer is not None and len(split_opening(loaded, tokens_of(loaded, "a"))[0]):
            each = "each after" if self.first_token else "only the first one after"
            begun = f", {each} the token that the tokenizer puts before a text"
        most = _most_windows(loaded, seqlen)
        few = f", {most} at a time at most" if most < Run().batch_size else ""
        return f"perplexity per token over {cut} windows of {seqlen} tokens of the concatenated text{begun}{few}"

    def _sizes(self, loaded: LoadedModel) -> tuple[int, int]:
        most = longest(loaded, LONGEST)
        seqlen = self.seqlen or min(most, LONGEST)
        if seqlen > most:
            raise DataError(f"the model takes {most} tokens at most, not seqlen={seqlen}")
        stride = self.stride or seqlen
        if stride > seqlen:
            raise DataError(f"a stride of {stride} would leave tokens out between windows of {seqlen}")
        return seqlen, stride

    def _tokens(self, loaded: LoadedModel, data: Data) -> tuple[Tensor, Tensor]:
        """Return the tokens that each window begins with, and those of the text."""
        check(self.name, loaded)
        tokens = tokens_of_corpus(loaded, data.content)
        return split_opening(loaded, tokens) if self.first_token else (tokens[:0], tokens)

    def _windows(self, loaded: LoadedModel, opening: Tensor, tokens: Tensor, name: str) -> tuple[Tensor, int]:
        """Return token ids `[windows, seqlen]`, and the stride."""
        seqlen, stride = self._sizes(loaded)
        inner = max(seqlen - len(opening), 1)
        if len(tokens) < inner:
            raise DataError(
                f"{name} has {len(tokens)} tokens, fewer than one window of {inner}; "
                f"lower it: --set {self.name}.seqlen=N"
            )
        stride = min(stride, inner)
        return opened(opening, tokens.unfold(0, inner, stride)), stride


def _most_windows(loaded: LoadedModel, length: int) -> int:
    """The number of windows of one forward whose logits are at most `LOGITS`, but one at least."""
    return max(1, LOGITS // (length * (vocabulary(loaded) or 1)))


def _losses(loaded: LoadedModel, batch: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each token but the first, `[windows, seqlen - 1]`, in float64."""
    batch = batch.to(device(loaded))
    found = logits(loaded, _inputs(loaded, batch))
    rows = max(1, PIECE // found.shape[-1])
    losses = [
        F.cross_entropy(scores.float(), truth, reduction="none")
        for window, tokens in zip(found[:, :-1], batch[:, 1:], strict=True)
        for scores, truth in zip(window.split(rows), tokens.split(rows), strict=True)
    ]
    return torch.cat(losses).double().view(len(batch), -1).cpu()


def _inputs(loaded: LoadedModel, batch: Tensor) -> dict[str, Any]:
    return arguments(loaded, {"input_ids": batch.to(device(loaded)), "use_cache": False})
