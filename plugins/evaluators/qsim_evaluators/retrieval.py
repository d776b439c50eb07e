"""`retrieval(seqlen)`: accuracy with which embeddings of queries find their passages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from qsim_transformers.hub import offline_unless_reachable
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.evaluation.metrics import rank
from qsim_evaluators.fitting import check
from qsim_evaluators.text import read_rows, tokenized

COLUMNS = ("query", "passage")
NEAR = 2.0**-20
"""Cosines of float32 states that differ by less are equal: the rounding of sums would decide."""
POOLING_FILE = "1_Pooling/config.json"
POOLINGS = {
    "mean_tokens": "mean-pooled",
    "max_tokens": "the largest state of each channel",
    "cls_token": "the state of the first token",
    "lasttoken": "the state of the last token",
}
"""Names in a checkpoint's pooling configuration, and their descriptions."""


class Retrieval(Evaluator):
    """The share of queries whose nearest passage by cosine is their own, and the change of embeddings.

    An embedding is the mean of the last hidden states over a text's tokens, scaled to length 1, as in Sentence-BERT
    (arXiv 1908.10084). A checkpoint that says how it pools, in `1_Pooling/config.json`, is pooled so. Each query is
    compared with all passages. One that is as near as its own, up to 2⁻²⁰, ranks before it. `cosine` compares each
    embedding with that of the unquantized model. Data are a mapping with `query` and `passage`, two lists of the same
    length.
    """

    name = "retrieval"
    metric = "accuracy_at_1"
    higher_is_better = True
    seqlen: PositiveInt = Field(128, description="tokens of a text that are read; the rest is cut off")

    def read(self, source: str, split: str = "test") -> Data:
        """Read pairs from the columns `query` and `passage` of a file of rows, a directory, or a name of `datasets`."""
        rows = read_rows(source, list(COLUMNS), split)
        return pairs(source, list(rows["query"]), list(rows["passage"]))

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Draw passages at random, one in a batch."""
        check(self.name, loaded)
        passages = data.content["passage"]
        chosen = torch.randint(len(passages), (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
        return [tokenized(loaded, [passages[place]], length or self.seqlen) for place in chosen]

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return the first passage."""
        check(self.name, loaded)
        return tokenized(loaded, data.content["passage"][:1], self.seqlen)

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute `accuracy_at_1`, `mrr` (the mean of 1 / rank) and `cosine`, and the number of `pairs`."""
        check(self.name, loaded)
        queries, passages = (data.content[column][: run.limit] for column in COLUMNS)
        embedded = self._embed(loaded, [*queries, *passages], run)
        exact = embedded if run.reference is None else run.reference
        query, passage = embedded.split(len(queries))
        scores = query @ passage.T
        place = rank(scores, torch.arange(len(queries)), NEAR)
        kept = F.cosine_similarity(embedded, exact, dim=1).view(2, -1).mean(0)
        samples = {"accuracy_at_1": (place == 1).double(), "mrr": 1 / place, "cosine": kept}
        return Metrics(samples, counts={"pairs": float(len(queries))}, outputs=embedded)

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe the embeddings and the comparison in words."""
        pooled = f"embeddings of {self.seqlen} tokens at most, {POOLINGS[pooling(loaded)]}"
        return f"accuracy at 1 of retrieval by cosine among all passages, {pooled}"

    def _embed(self, loaded: LoadedModel, texts: list[str], run: Run) -> Tensor:
        """Compute embeddings `[texts, width]` in float64, each scaled to length 1."""
        how = pooling(loaded)
        batches = [texts[start : start + run.batch_size] for start in range(0, len(texts), run.batch_size)]
        found = []
        with torch.no_grad():
            for batch in run.track(batches, len(batches), "texts"):
                inputs = tokenized(loaded, batch, self.seqlen)
                states = loaded.model(**inputs).last_hidden_state.double()
                found.append(F.normalize(pooled(states, inputs["attention_mask"] > 0, how), dim=1).cpu())
        return torch.cat(found)


def pooling(loaded: LoadedModel) -> str:
    """Return how the checkpoint pools, a key of `POOLINGS`: the mean if it does not say.

    Raises `DataError` for another pooling.
    """
    source = getattr(getattr(loaded.model, "config", None), "_name_or_path", "")
    path = Path(source) / POOLING_FILE
    if source and not Path(source).is_dir():
        from transformers.utils import cached_file

        with offline_unless_reachable(source):
            path = Path(cached_file(source, POOLING_FILE, _raise_exceptions_for_missing_entries=False) or path)
    if not path.is_file():
        return "mean_tokens"
    options = json.loads(path.read_text(encoding="utf-8"))
    found = [key.removeprefix("pooling_mode_") for key, chosen in options.items() if chosen is True and "_mode_" in key]
    if isinstance(options.get("pooling_mode"), str):
        found = [f"{options['pooling_mode']}_token"]
    known = [name for name in POOLINGS if found in ([name], [f"{name}s"], [name.removesuffix("s")])]
    if not known:
        raise DataError(f"retrieval does not know the pooling {' + '.join(found)} of {path}")
    return known[0]


def pooled(states: Tensor, kept: Tensor, how: str) -> Tensor:
    """Pool states `[texts, tokens, width]` over the tokens that are kept."""
    if how == "mean_tokens":
        mask = kept.unsqueeze(2).to(states)
        return (states * mask).sum(1) / mask.sum(1)
    if how == "max_tokens":
        return states.masked_fill(~kept.unsqueeze(2), -torch.inf).amax(1)
    places = torch.arange(kept.shape[1], device=kept.device)
    last = places.where(kept, -1).argmax(1) if how == "lasttoken" else kept.int().argmax(1)
    return states[torch.arange(len(states)), last]


def pairs(name: str, queries: list[str], passages: list[str]) -> Data:
    """Make data of pairs, with the SHA-256 of their JSON. Raises `DataError` for fewer than two pairs."""
    if len(queries) < 2:
        raise DataError(f"{name} has {len(queries)} pairs; retrieval needs at least two")
    digest = hashlib.sha256(json.dumps([queries, passages]).encode()).hexdigest()
    return Data(name, {"query": queries, "passage": passages}, digest)
