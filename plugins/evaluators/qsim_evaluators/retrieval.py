"""`retrieval(seqlen)`: whether a text's embedding still finds the text that it belongs to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_evaluators.fitting import check
from qsim_evaluators.text import read_rows, tokenized

COLUMNS = ("query", "passage")


class Retrieval(Evaluator):
    """How often the passage nearest to a query, by cosine, is its own; and how far embeddings have moved.

    An embedding is the mean of the last hidden states over a text's tokens, of length 1, as Sentence-BERT has it
    (arXiv 1908.10084). Every passage competes for every query. `cosine` is that of each embedding with the one that the
    model gives as it is. Data are a mapping with `query` and `passage`, two lists of one length.
    """

    name = "retrieval"
    metric = "accuracy_at_1"
    higher_is_better = True
    seqlen: PositiveInt = Field(128, description="tokens of a text that are read; the rest is cut off")

    def read(self, source: str, split: str = "test") -> Data:
        """Pairs from `datasets`, columns `query` and `passage`: `NAME[:CONFIG[:SPLIT]]` or a directory of files."""
        rows = read_rows(source, list(COLUMNS), split)
        return pairs(source, list(rows["query"]), list(rows["passage"]))

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Passages drawn at random, one in a batch."""
        check(self.name, loaded)
        passages = data.content["passage"]
        chosen = torch.randint(len(passages), (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
        return [tokenized(loaded, [passages[place]], length or self.seqlen) for place in chosen]

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """The first passage."""
        check(self.name, loaded)
        return tokenized(loaded, data.content["passage"][:1], self.seqlen)

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """`accuracy_at_1`, `mrr` (the mean of 1 over the rank), `cosine`, and the number of `pairs`."""
        check(self.name, loaded)
        queries, passages = (data.content[column][: run.limit] for column in COLUMNS)
        embedded = self._embed(loaded, [*queries, *passages], run)
        exact = embedded if run.reference is None else run.reference
        query, passage = embedded.split(len(queries))
        scores = query @ passage.T
        own = scores.diagonal().unsqueeze(1)
        rank = (scores > own).sum(1) + 1
        kept = F.cosine_similarity(embedded, exact, dim=1).view(2, -1).mean(0)
        samples = {"accuracy_at_1": (rank == 1).double(), "mrr": 1 / rank.double(), "cosine": kept}
        return Metrics(samples, counts={"pairs": float(len(queries))}, outputs=embedded)

    def protocol(self, loaded: LoadedModel) -> str:
        """The embedding and the competition in words."""
        pooled = f"mean-pooled embeddings of {self.seqlen} tokens at most"
        return f"accuracy at 1 of retrieval by cosine among all passages, {pooled}"

    def _embed(self, loaded: LoadedModel, texts: list[str], run: Run) -> Tensor:
        """`[texts, width]` in float64, each of length 1."""
        batches = [texts[start : start + run.batch_size] for start in range(0, len(texts), run.batch_size)]
        found = []
        with torch.no_grad():
            for batch in run.track(batches, len(batches), "texts"):
                inputs = tokenized(loaded, batch, self.seqlen)
                states = loaded.model(**inputs).last_hidden_state.double()
                mask = inputs["attention_mask"].unsqueeze(2).to(states)
                found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1).cpu())
        return torch.cat(found)


def pairs(name: str, queries: list[str], passages: list[str]) -> Data:
    """Data of pairs, with the SHA-256 of their JSON. Raises `DataError` if there are none to tell apart."""
    if len(queries) < 2:
        raise DataError(f"{name} has {len(queries)} pairs; retrieval needs two at least")
    digest = hashlib.sha256(json.dumps([queries, passages]).encode()).hexdigest()
    return Data(name, {"query": queries, "passage": passages}, digest)
