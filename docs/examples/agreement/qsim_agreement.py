"""The share of places where the likeliest next token stays the same: `agreement(seqlen=128)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import qsim_core as qsim


class Agreement(qsim.Evaluator):
    """The share of places where the model's likeliest token is the one of the model as it is."""

    name = "agreement"
    metric = "agreement"
    higher_is_better = True
    seqlen: int = Field(32, ge=1, description="tokens of a window")

    def evaluate(self, loaded: qsim.LoadedModel, data: qsim.Data, run: qsim.Run) -> dict[str, float]:
        """Each window is a sample. Raises `DataError`."""
        parts = self._windows(loaded, data)[: run.limit].split(run.batch_size)
        with torch.no_grad():
            found = [
                loaded.model(input_ids=part).logits.argmax(-1).cpu() for part in run.track(parts, len(parts), self.name)
            ]
        tokens = torch.cat(found)
        exact = tokens if run.reference is None else run.reference  # the `outputs` of the model as it is
        return qsim.Metrics({"agreement": (tokens == exact).float().mean(1)}, outputs=tokens)

    def read(self, source: str, split: str = "test") -> qsim.Data:
        """A file of text. Raises `DataError`."""
        try:
            return qsim.Data.of_text(source, Path(source).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise qsim.DataError(f"{source} is no text that can be read: {error}") from None

    def example(self, loaded: qsim.LoadedModel, data: qsim.Data) -> dict[str, Any]:
        return {"input_ids": self._windows(loaded, data)[:1]}

    def _windows(self, loaded: qsim.LoadedModel, data: qsim.Data) -> Tensor:
        """Tokens [windows, seqlen]. Raises `DataError`."""
        if loaded.tokenizer is None:
            raise qsim.DataError(f"{self} needs a tokenizer, and the model was loaded without one")
        tokens = torch.tensor(loaded.tokenizer(data.content, verbose=False).input_ids)
        count = len(tokens) // self.seqlen
        if count == 0:
            raise qsim.DataError(f"{data.name} has {len(tokens)} tokens, fewer than one window of {self.seqlen}")
        windows = tokens[: count * self.seqlen].view(count, self.seqlen)
        return windows.to(next(loaded.model.parameters()).device)


@qsim.hookimpl
def qsim_evaluators() -> list[type[qsim.Evaluator]]:
    return [Agreement]
