"""The loaded model behind the harness's interface."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from qsim_transformers.tokens import check_ids
from torch import Tensor, nn

from qsim_core import LoadedModel, Run

BATCHES = 16
"""Batches in a portion of requests. The harness sorts the requests of a portion by length."""


class InMemory(HFLM):  # type: ignore[misc]
    """A model in memory, unquantized or simulated. Requests are answered in portions, so that progress is shown."""

    def __init__(self, loaded: LoadedModel, run: Run, max_length: int | None) -> None:
        with _left_alone(loaded.model):
            super().__init__(
                pretrained=loaded.model,
                tokenizer=copy.deepcopy(loaded.tokenizer),  # the harness may add a padding token
                batch_size=run.batch_size,
                max_length=max_length,
                softmax_dtype=torch.float32,
            )
        self._track = run.track

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._in_pieces(super().loglikelihood, requests, BATCHES)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self._in_pieces(super().loglikelihood_rolling, requests, 1)  # one document has many windows

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return self._in_pieces(super().generate_until, requests, BATCHES)

    def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Any:
        return super()._model_call(check_ids(self.model, inps), *args, **options)

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Any:
        return super()._model_generate(check_ids(self.model, context), *args, **options)

    def _in_pieces(self, answer: Callable[[list[Any]], list[Any]], requests: list[Any], batches: int) -> list[Any]:
        size = batches * int(self.batch_size)
        pieces = [requests[start : start + size] for start in range(0, len(requests), size)]
        return [one for piece in self._track(pieces, len(pieces), "requests") for one in answer(piece)]


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Keep the harness from tying weights again: a transform may have split one weight into two that differ."""
    model.tie_weights = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.tie_weights
