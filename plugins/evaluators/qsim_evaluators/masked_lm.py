"""`masked_lm(seqlen, share, seed)`: perplexity and accuracy of a model that predicts masked tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.evaluation.metrics import Means, rank
from qsim_evaluators.asking import arguments, logits
from qsim_evaluators.fitting import check, device, longest
from qsim_evaluators.text import cut_windows, draw_windows, read_text, tokens_of_corpus

LONGEST = 512
IGNORED = -100
"""The label of tokens that transformers leaves out of a loss."""


class MaskedLM(Evaluator):
    """exp of the mean negative log-likelihood of masked tokens over windows of the whole text, and their accuracy.

    The text is tokenized in one piece and cut into windows. A window has `seqlen` tokens, including the tokenizer's
    first and last token, where it has them. A remainder that fills no window is dropped. In each window the same number
    of tokens, `share` of them, is replaced by the mask token. Only `seed` determines their places. The default is
    BERT's 15% (arXiv 1810.04805).
    """

    name = "masked_lm"
    metric = "masked_perplexity"
    seqlen: int | None = Field(None, ge=3, description="tokens of a window; none: the model's maximum, 512 at most")
    share: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are masked")
    seed: int = Field(0, description="seed of the masked places, the same in every run")

    def read(self, source: str, split: str = "test") -> Data:
        """Read text from a file, or from `datasets`: `NAME[:CONFIG[:SPLIT]]` or a directory of data files."""
        return read_text(source, "a masked language model", split)

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Draw windows at random places of the text, masked as in the evaluation, one in a batch."""
        length = self._length(loaded, length)
        inner = length - len(_ends(loaded))
        windows = torch.cat(draw_windows(self._tokens(loaded, data), samples, inner, seed, data.name))
        seen, _ = self._masked(loaded, windows, seed)
        return [self._batch(loaded, window) for window in seen.split(1)]

    def training(self, loaded: LoadedModel, data: Data, length: int | None) -> list[dict[str, Tensor]]:
        """Cut the text into windows, masked as in the evaluation. The labels are the masked tokens."""
        inner = self._length(loaded, length) - len(_ends(loaded))
        seen, labels = self._masked(loaded, cut_windows(self._tokens(loaded, data), inner, data.name), self.seed)
        wanted = torch.where(labels < 0, IGNORED, labels)
        return [{"input_ids": ids, "labels": of} for ids, of in zip(seen, wanted, strict=True)]

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return the first window, masked."""
        return self._batch(loaded, self._windows(loaded, data)[0][:1])

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute `masked_perplexity`, `nll` (nats per masked token) and `accuracy`, and count masked `tokens`."""
        seen, labels = (part[: run.limit] for part in self._windows(loaded, data))
        batches = list(zip(seen.split(run.batch_size), labels.split(run.batch_size), strict=True))

        def scored(pair: tuple[Tensor, Tensor]) -> Tensor:
            batch, answers = pair
            scores = logits(loaded, self._batch(loaded, batch)).float().cpu()
            wanted = scores[answers >= 0].view(len(batch), -1, scores.shape[-1])
            truth = answers[answers >= 0].view(len(batch), -1)
            nll = F.cross_entropy(wanted.transpose(1, 2), truth, reduction="none").double()
            return torch.stack([nll.mean(1), (rank(wanted, truth) == 1).double().mean(1)])

        with torch.no_grad():
            nll, right = run.over(batches, scored, "masked tokens")

        def metrics(means: Means) -> Means:
            return {"masked_perplexity": means["nll"].exp(), **means}

        counts = {"tokens": float((labels >= 0).sum())}
        return Metrics({"nll": nll, "accuracy": right}, metrics, counts=counts, in_order=True)

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe the windows and the mask in words."""
        return (
            f"perplexity of masked tokens, {self.share:.0%} of each non-overlapping window of {self._length(loaded)} "
            f"tokens of the concatenated text, places drawn by seed {self.seed}"
        )

    def _length(self, loaded: LoadedModel, wanted: int | None = None) -> int:
        check(self.name, loaded)
        if getattr(loaded.tokenizer, "mask_token_id", None) is None:
            raise DataError(f"{self.name} needs a tokenizer with a mask token; perplexity may fit this model")
        most = longest(loaded, LONGEST)
        length = wanted or self.seqlen or min(most, LONGEST)
        if not 3 <= length <= most:
            raise DataError(f"windows of {length} tokens: the model takes 3 to {most}")
        return length

    @staticmethod
    def _tokens(loaded: LoadedModel, data: Data) -> Tensor:
        return tokens_of_corpus(loaded, data.content, add_special_tokens=False)

    def _windows(self, loaded: LoadedModel, data: Data) -> tuple[Tensor, Tensor]:
        """Return tokens `[windows, seqlen]` with masks, and the true tokens, -1 where a token is not masked."""
        inner, tokens = self._length(loaded) - len(_ends(loaded)), self._tokens(loaded, data)
        if len(tokens) < inner:
            raise DataError(
                f"{data.name} has {len(tokens)} tokens, fewer than one window of {inner}; "
                f"lower it: --set {self.name}.seqlen=N"
            )
        return self._masked(loaded, tokens[: len(tokens) // inner * inner].view(-1, inner), self.seed)

    def _masked(self, loaded: LoadedModel, windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        tokenizer, inner = loaded.tokenizer, windows.shape[1]
        many = max(1, round(self.share * inner))
        lots = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed))
        masked = torch.zeros(windows.shape, dtype=torch.bool).scatter_(1, lots.topk(many).indices, True)
        seen = torch.where(masked, tokenizer.mask_token_id, windows)
        labels = torch.where(masked, windows, -1)
        for side, token in _ends(loaded):
            seen, labels = F.pad(seen, side, value=token), F.pad(labels, side, value=-1)
        return seen, labels

    @staticmethod
    def _batch(loaded: LoadedModel, seen: Tensor) -> dict[str, Any]:
        return arguments(loaded, {"input_ids": seen.to(device(loaded))})


def _ends(loaded: LoadedModel) -> list[tuple[tuple[int, int], int]]:
    """Return the tokens around a window that the tokenizer has, each with its side as `F.pad` takes it."""
    sides = {"cls_token_id": (1, 0), "sep_token_id": (0, 1)}
    found = ((side, getattr(loaded.tokenizer, name, None)) for name, side in sides.items())
    return [(side, token) for side, token in found if token is not None]
