"""`retrieval(seqlen)`: accuracy with which embeddings of queries find their passages."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.evaluation.metrics import rank
from qsim_evaluators.fitting import check
from qsim_evaluators.text import read_rows, tokenized

COLUMNS = ("query", "passage")


class Retrieval(Evaluator):
    """The share of queries whose nearest passage by cosine is their own, and the change of embeddings.

    An embedding is the mean of the last hidden states over a text's tokens, scaled to length 1, as in Sentence-BERT
    (arXiv 1908.10084). Each query is compared with all passages; one that is as near as its own ranks before it.
    `cosine` compares each embedding with that of the unquantized model. Data are a mapping with `query` and `passage`,
    two lists of the same length.
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
        place = rank(scores, torch.arange(len(queries)))
        kept = F.cosine_similarity(embedded, exact, dim=1).view(2, -1).mean(0)
        samples = {"accuracy_at_1": (place == 1).double(), "mrr": 1 / place, "cosine": kept}
        return Metrics(samples, counts={"pairs": float(len(queries))}, outputs=embedded)

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe the embeddings and the comparison in words."""
        pooled = f"mean-pooled embeddings of {self.seqlen} tokens at most"
        return f"accuracy at 1 of retrieval by cosine among all passages, {pooled}"

    def _embed(self, loaded: LoadedModel, texts: list[str], run: Run) -> Tensor:
        """Compute embeddings `[texts, width]` in float64, each scaled to length 1."""
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
    """Make data of pairs, with the SHA-256 of their JSON. Raises `DataError` for fewer than two pairs."""
    if len(queries) < 2:
        raise DataError(f"{name} has {len(queries)} pairs; retrieval needs at least two")
    digest = hashlib.sha256(json.dumps([queries, passages]).encode()).hexdigest()
    return Data(name, {"query": queries, "passage": passages}, digest)
