"""Retrieval against a plain loop, on an encoder small enough to write down."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import EvaluatorSuite

WIDTH = 6
QUERIES = ["the sum of two", "a list of names", "open a file", "the sum of three"]
PASSAGES = [
    "add one to another, the sum",
    "names in a list, one after another",
    "a path is opened for reading",
    "three, the sum",
]


class Encoder(nn.Module):
    """An encoder whose states are rows of a table of letters."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(128, WIDTH, generator=generator)
        self.table = nn.Parameter(table + noise * torch.randn(table.shape, generator=generator))
        self.config = SimpleNamespace(max_position_embeddings=64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


def letters(
    texts: list[str], padding: bool, truncation: bool, max_length: int, return_tensors: str
) -> dict[str, Tensor]:
    cut = [[ord(letter) for letter in text[:max_length]] for text in texts]
    longest = max(map(len, cut))
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in cut]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in cut]),
    }


letters.pad_token_id = 0  # type: ignore[attr-defined]


def pairs() -> qsim.Data:
    return qsim.Data("pairs", {"query": QUERIES, "passage": PASSAGES}, "0" * 64)


def embedding(model: Any, text: str, length: int) -> list[float]:
    rows = [model.table[ord(letter)].tolist() for letter in text[:length]]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    norm = math.sqrt(sum(value * value for value in mean))
    return [value / norm for value in mean]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("length", [5, 64])
def test_it_is_what_a_plain_loop_gives(length: int, batch_size: int) -> None:
    before, after = Encoder(), Encoder(0.3)
    evaluator, run = qsim.parse(f"retrieval({length})"), {"batch_size": batch_size}
    exact = evaluator.evaluate(qsim.LoadedModel(before, letters), pairs(), qsim.Run(**run))

    found = evaluator.evaluate(qsim.LoadedModel(after, letters), pairs(), qsim.Run(**run, reference=exact.outputs))

    right, reciprocal, cosine = 0, 0.0, 0.0
    passages = [embedding(after, text, length) for text in PASSAGES]
    for place, text in enumerate(QUERIES):
        query = embedding(after, text, length)
        scores = [sum(a * b for a, b in zip(query, passage, strict=True)) for passage in passages]
        rank = 1 + sum(score > scores[place] for score in scores)
        right += rank == 1
        reciprocal += 1 / rank
    for text in (*QUERIES, *PASSAGES):
        both = zip(embedding(before, text, length), embedding(after, text, length), strict=True)
        cosine += sum(a * b for a, b in both)
    assert found["accuracy_at_1"] == right / 4
    assert found["mrr"] == pytest.approx(reciprocal / 4, rel=1e-9)
    assert found["cosine"] == pytest.approx(cosine / 8, rel=1e-6)
    assert exact["cosine"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_embeddings_find_nothing(value: float) -> None:
    model = Encoder()
    model.table.data.fill_(value)

    found = qsim.parse("retrieval(64)").evaluate(qsim.LoadedModel(model, letters), pairs(), qsim.Run())

    assert (found["accuracy_at_1"], found["mrr"]) == (0, 1 / 4)


@pytest.mark.parametrize(("mode", "places"), [("cls_token", [0]), ("lasttoken", [-1]), ("mean_tokens", slice(None))])
def test_a_checkpoint_is_pooled_as_it_says(mode: str, places: Any, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    loaded = qsim.LoadedModel(Encoder(), letters)
    loaded.model.config._name_or_path = str(tmp_path)  # type: ignore[union-attr]

    found = qsim.parse("retrieval(64)").evaluate(loaded, pairs(), qsim.Run()).outputs

    for text, embedding in zip((*QUERIES, *PASSAGES), found, strict=True):
        states = loaded.model.table[[ord(letter) for letter in text]][places]  # type: ignore[index]
        assert torch.allclose(embedding, nn.functional.normalize(states.double().mean(0), dim=0))
    assert "mean-pooled" not in qsim.parse("retrieval(64)").protocol(loaded) or mode == "mean_tokens"


def test_a_pooling_that_is_not_known_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    loaded = qsim.LoadedModel(Encoder(), letters)
    loaded.model.config._name_or_path = str(tmp_path)  # type: ignore[union-attr]

    with pytest.raises(qsim.DataError, match=r"^retrieval does not know the pooling weightedmean_tokens of .*json$"):
        qsim.parse("retrieval(64)").evaluate(loaded, pairs(), qsim.Run())


def test_limit_takes_the_first_pairs() -> None:
    loaded = qsim.LoadedModel(Encoder(), letters)

    assert qsim.parse("retrieval(64)").evaluate(loaded, pairs(), qsim.Run(limit=2))["pairs"] == 2


def test_a_text_longer_than_the_model_takes() -> None:
    with pytest.raises(qsim.DataError, match="^the model takes 64 tokens at most, not 128$"):
        qsim.parse("retrieval").example(qsim.LoadedModel(Encoder(), letters), pairs())


def test_calibration_draws_single_passages() -> None:
    batches = qsim.parse("retrieval(64)").calibration(qsim.LoadedModel(Encoder(), letters), pairs(), 3, 7, seed=0)

    assert [batch["input_ids"].shape for batch in batches] == [(1, 7)] * 3


def test_pairs_from_a_data_set(tmp_path: Path) -> None:
    rows = [{"query": q, "passage": p} for q, p in zip(QUERIES, PASSAGES, strict=True)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))

    assert qsim.parse("retrieval").read(str(tmp_path)).content == pairs().content
    assert qsim.parse("retrieval").read(str(tmp_path / "test.jsonl")).content == pairs().content


def test_a_file_that_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("a b")

    with pytest.raises(
        qsim.DataError, match=r"pairs.txt is not a file of rows; their names end in .jsonl, .json, .csv, .parquet$"
    ):
        qsim.parse("retrieval").read(str(tmp_path / "pairs.txt"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "a", "text": "b"}] * 2, r"has no column 'passage'; it has query, text$"),
        ([{"query": "a", "passage": "b"}], r"has 1 pairs; retrieval needs at least two$"),
    ],
)
def test_data_that_are_no_pairs(tmp_path: Path, rows: list[Any], message: str) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))

    with pytest.raises(qsim.DataError, match=message):
        qsim.parse("retrieval").read(str(tmp_path))


class TestRetrieval(EvaluatorSuite):
    text = "retrieval(16)"

    def loaded(self) -> qsim.LoadedModel:
        return qsim.LoadedModel(Encoder(), letters)

    def data(self, evaluator: Any) -> qsim.Data:
        return pairs()


def test_the_rounding_of_a_product_decides_no_rank() -> None:
    """Cosines of 384 equal channels differ by 1e-16 between the columns of one product."""
    many, model = 50, Encoder()
    row = torch.randn(1, 384, generator=torch.Generator().manual_seed(0))
    model.table = nn.Parameter(row.expand(128, -1).clone())
    texts = qsim.Data("pairs", {"query": ["a"] * many, "passage": ["b"] * many}, "0" * 64)

    found = qsim.parse("retrieval(64)").evaluate(qsim.LoadedModel(model, letters), texts, qsim.Run(batch_size=100))

    assert (found["accuracy_at_1"], found["mrr"]) == (0, 1 / many)
