"""Evaluators: `perplexity(seqlen, stride)`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Run, hookimpl

LONGEST = 2048


class Perplexity(Evaluator):
    """exp of the mean negative log-likelihood per predicted token, over windows of the whole text.

    The text is tokenized in one piece and cut into windows of `seqlen` tokens, one every `stride`; a rest that
    fills no window is dropped, and a window's first token is context only. With `stride` equal to `seqlen`, the
    default, this is the protocol of GPTQ's evaluation (arXiv 2210.17323); a smaller stride counts each later
    window's last `stride` tokens. Logits are turned into log-probabilities in float32 and summed in float64.
    """

    name = "perplexity"
    metric = "perplexity"
    seqlen: PositiveInt | None = Field(None, description="tokens of a window; none: what the model takes, 2048 at most")
    stride: PositiveInt | None = Field(None, description="tokens from one window to the next; none: seqlen")

    @model_validator(mode="after")
    def _fits(self) -> Perplexity:
        if self.seqlen is not None and self.seqlen < 2:
            raise ValueError(f"a window of {self.seqlen} token predicts nothing; seqlen is at least 2")
        if self.seqlen is not None and self.stride is not None and self.stride > self.seqlen:
            raise ValueError(f"a stride of {self.stride} would leave tokens out between windows of {self.seqlen}")
        return self

    def read(self, source: str) -> Data:
        """Text from a file, or from `datasets`: `NAME[:CONFIG[:SPLIT]]` or a directory of data files.

        A data set's rows are joined by blank lines, as GPTQ's evaluation joins them.
        """
        path = Path(source).expanduser()
        if path.is_file():
            return _text(str(source), _read_file(path))
        directory = Path(source.partition(":")[0]).expanduser()
        if not directory.is_dir() and (source.startswith((".", "/", "~")) or path.suffix):
            raise DataError(f"there is no file {source}")
        return _text(source, _read_dataset(source))

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Windows at random places of the text, as GPTQ draws them, one in a batch: `samples` of `length` tokens."""
        length = length or self._sizes(loaded)[0]
        longest = getattr(loaded.model.config, "max_position_embeddings", None) or LONGEST
        if not 2 <= length <= longest:
            raise DataError(f"calibration windows of {length} tokens: the model takes 2 to {longest}")
        tokens = torch.tensor(loaded.tokenizer(data.content, verbose=False).input_ids, dtype=torch.long)
        if len(tokens) < length:
            raise DataError(f"{data.name} has {len(tokens)} tokens, fewer than one calibration window of {length}")
        starts = torch.randint(len(tokens) - length + 1, (samples,), generator=torch.Generator().manual_seed(seed))
        windows = [tokens[start : start + length].unsqueeze(0).to(_device(loaded)) for start in starts.tolist()]
        return [{"input_ids": window, "use_cache": False} for window in windows]

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """The first window alone, without a cache."""
        windows, _ = self._windows(loaded, data)
        return {"input_ids": windows[:1].to(_device(loaded)), "use_cache": False}

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> dict[str, float]:
        """`perplexity`, `nll` (nats per token) and the number of predicted `tokens`."""
        windows, stride = self._windows(loaded, data)
        windows = windows[: run.limit]
        total, tokens = 0.0, 0
        batches = list(windows.split(run.batch_size))
        with torch.no_grad():
            for batch in run.track(batches, len(batches), "perplexity"):
                losses = _losses(loaded, batch)
                fresh = losses[:, -min(stride, losses.shape[1]) :]
                opening = losses[:1, : losses.shape[1] - fresh.shape[1]] if tokens == 0 else fresh[:0]
                total += float(fresh.sum() + opening.sum())
                tokens += fresh.numel() + opening.numel()
        return {"perplexity": _exp(total / tokens), "nll": total / tokens, "tokens": float(tokens)}

    def protocol(self, loaded: LoadedModel) -> str:
        """The windows, the stride and the weighting in words."""
        seqlen, stride = self._sizes(loaded)
        cut = "non-overlapping" if stride == seqlen else f"stride {stride}"
        return f"perplexity per token over {cut} windows of {seqlen} tokens of the concatenated text"

    def _sizes(self, loaded: LoadedModel) -> tuple[int, int]:
        longest = getattr(loaded.model.config, "max_position_embeddings", None) or LONGEST
        seqlen = self.seqlen or min(longest, LONGEST)
        if seqlen > longest:
            raise DataError(f"the model takes {longest} tokens at most, not seqlen={seqlen}")
        stride = self.stride or seqlen
        if stride > seqlen:
            raise DataError(f"a stride of {stride} would leave tokens out between windows of {seqlen}")
        return seqlen, stride

    def _windows(self, loaded: LoadedModel, data: Data) -> tuple[Tensor, int]:
        """`[windows, seqlen]` token ids, and the stride."""
        seqlen, stride = self._sizes(loaded)
        tokens = torch.tensor(loaded.tokenizer(data.content, verbose=False).input_ids, dtype=torch.long)
        if len(tokens) < seqlen:
            raise DataError(f"{data.name} has {len(tokens)} tokens, fewer than one window of {seqlen}; lower seqlen")
        return tokens.unfold(0, seqlen, stride), stride


def _losses(loaded: LoadedModel, batch: Tensor) -> Tensor:
    """Negative log-likelihood of each token but the first, `[windows, seqlen - 1]`, in float64."""
    batch = batch.to(_device(loaded))
    logits = loaded.model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").double().view(len(batch), -1)


def _device(loaded: LoadedModel) -> torch.device:
    return next(loaded.model.parameters()).device


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf if x == x else math.nan


def _text(name: str, text: str) -> Data:
    if not text.strip():
        raise DataError(f"{name} is empty: there is no text to measure perplexity on")
    return Data.of_text(name, text)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None


def _read_dataset(source: str) -> str:
    from datasets import load_dataset

    name, config, split, *_ = (*source.split(":"), None, None, None)
    try:
        rows = load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # datasets raises whatever its many loaders raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source!r} is no file, and datasets cannot load it: {reason}") from None
    if "text" not in rows.column_names:
        raise DataError(f"{source!r} has no column 'text'; it has {', '.join(rows.column_names)}")
    return "\n\n".join(rows["text"])


@hookimpl
def qsim_evaluators() -> list[type[Evaluator]]:
    return [Perplexity]
