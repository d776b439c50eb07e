"""SQuAD's scores against torchmetrics, and the search for an answer with a model that points to given words."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qsim_evaluators.question_answering import normalized, overlap
from torch import Tensor, nn
from transformers import BertTokenizer

import qsim_core as qsim
from qsim_core.testing import EvaluatorSuite

WORDS = [
    "who",
    "sat",
    "on",
    "the",
    "mat",
    "a",
    "cat",
    "dog",
    "and",
    "ran",
    "away",
    "from",
    "it",
    "while",
    "rain",
    "fell",
    ".",
]
CONTEXT = "A cat sat on the mat. The dog ran away from it while rain fell and fell and fell."
QUESTIONS = ["Who sat?", "Who ran away?", "Who fell?"]


class Pointer(nn.Module):
    """A model whose start logits are high at one given word, and end logits at another."""

    def __init__(self, begin: str, end: str, none: float = -9.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.begin, self.end = (nn.Parameter(torch.full((len(vocabulary()),), -5.0)) for _ in range(2))
        with torch.no_grad():
            self.begin[vocabulary()[begin]], self.end[vocabulary()[end]] = 3.0, 4.0
            self.begin[vocabulary()["[CLS]"]] = self.end[vocabulary()["[CLS]"]] = none

    def forward(self, input_ids: Tensor, **others: Tensor) -> Any:
        return SimpleNamespace(start_logits=self.begin[input_ids], end_logits=self.end[input_ids])


def vocabulary() -> dict[str, int]:
    return {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "?"])}


def ask(
    model: Pointer, answers: list[list[str]], evaluator: str = "question_answering(64, stride=8)", **run: Any
) -> Any:
    loaded = qsim.LoadedModel(model, BertTokenizer(vocab=vocabulary()))
    return qsim.parse(evaluator).evaluate(loaded, cats(answers), qsim.Run(**run))


def cats(answers: list[list[str]]) -> qsim.Data:
    return qsim.Data("cats", {"question": QUESTIONS, "context": [CONTEXT] * 3, "answers": answers}, "0" * 64)


def test_scores_are_torchmetrics() -> None:
    from torchmetrics.functional.text import squad

    draw = random.Random(0)
    words = ["the", "a", "cat", "Cat,", "dog", "dog.", "an", "U.S."]
    for _ in range(200):
        answer, truth = (" ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(2))
        if not (normalized(answer) and normalized(truth)):
            continue  # for two empty texts torchmetrics gives 0, SQuAD's v2 script gives 1
        oracle = squad(
            [{"prediction_text": answer, "id": "0"}], [{"answers": {"answer_start": [0], "text": [truth]}, "id": "0"}]
        )
        assert 100 * overlap(answer, truth) == pytest.approx(float(oracle["f1"]), abs=1e-4)
        assert 100 * (normalized(answer) == normalized(truth)) == float(oracle["exact_match"])


def test_nothing_answers_only_what_has_no_answer() -> None:
    assert (overlap("", ""), overlap("", "cat"), overlap("cat", ""), overlap("the", "")) == (1, 0, 0, 1)


def test_an_answer_is_the_text_between_the_likeliest_ends() -> None:
    found = ask(Pointer("dog", "away"), [["the dog ran away"], ["dog"], ["rain", "a dog ran away"]])

    assert found == {
        "f1": pytest.approx((1 + 2 * 1 / (3 + 1) + 1) / 3),
        "exact_match": pytest.approx(2 / 3),
        "questions": 3,
    }


def test_of_equally_likely_answers_the_worst_counts() -> None:
    model = Pointer("dog", "away")
    model.begin.data.zero_()
    model.end.data.zero_()

    assert ask(model, [["the dog ran away"], ["A cat"], []])["f1"] == 0


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_logits_that_are_not_finite_answer_nothing_not_even_what_has_no_answer(logit: float) -> None:
    model = Pointer("dog", "away")
    model.end.data.fill_(logit)

    assert math.isnan(ask(model, [["the dog ran away"], [], []])["exact_match"])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_answer_is_found_in_whichever_window_it_stands(batch_size: int) -> None:
    found = ask(
        Pointer("rain", "fell"),
        [["rain fell"]] * 3,
        "question_answering(16, stride=4, longest_answer=2)",
        batch_size=batch_size,
    )

    assert found["exact_match"] == 1


def test_an_answer_is_not_longer_than_is_allowed_and_not_backwards() -> None:
    assert (
        ask(Pointer("cat", "rain"), [["cat sat on the mat"]] * 3, "question_answering(64, stride=8, longest_answer=3)")[
            "exact_match"
        ]
        == 0
    )
    assert ask(Pointer("rain", "cat"), [["cat"]] * 3)["exact_match"] == 1  # the likeliest that is not backwards


def test_no_answer_is_given_only_where_some_questions_have_none() -> None:
    none = Pointer("dog", "away", none=9.0)

    assert ask(none, [["dog ran away"], ["dog ran away"], []])["exact_match"] == pytest.approx(1 / 3)
    assert ask(none, [["dog ran away"]] * 3)["exact_match"] == 1


def test_the_labels_of_a_window_are_the_ends_of_the_answer_or_the_first_token() -> None:
    loaded, data = qsim.LoadedModel(Pointer("dog", "away"), BertTokenizer(vocab=vocabulary())), cats([["dog ran"]] * 3)

    samples = qsim.parse("question_answering(16, stride=4)").training(loaded, data, None)

    words = {place: word for word, place in vocabulary().items()}
    spans = [
        [words[int(i)] for i in sample["input_ids"][int(sample["start_positions"]) : int(sample["end_positions"]) + 1]]
        for sample in samples
    ]
    assert [next(s for s in spans if s[0] == word) for word in ("dog", "[CLS]")] == [["dog", "ran"], ["[CLS]"]]
    assert all(span in (["dog", "ran"], ["[CLS]"]) for span in spans)
    assert all(len(sample["input_ids"]) == 16 for sample in samples)


def test_a_question_without_an_answer_is_labelled_with_the_first_token() -> None:
    loaded = qsim.LoadedModel(Pointer("dog", "away"), BertTokenizer(vocab=vocabulary()))

    samples = qsim.parse("question_answering(64, stride=8)").training(loaded, cats([[], ["cat"], []]), None)

    assert [int(sample["end_positions"]) for sample in samples] == [0, 7, 0]


def test_squads_own_file_and_data_sets_read_the_same(tmp_path: Path) -> None:
    questions = [
        {"id": str(n), "question": q, "answers": [{"text": "cat", "answer_start": 2}]} for n, q in enumerate(QUESTIONS)
    ]
    (tmp_path / "dev.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": questions}]}]}))
    (tmp_path / "set").mkdir()
    rows = [{"question": q, "context": CONTEXT, "answers": {"text": ["cat"], "answer_start": [2]}} for q in QUESTIONS]
    (tmp_path / "set" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = qsim.parse("question_answering").read

    official, data_set = read(str(tmp_path / "dev.json")), read(str(tmp_path / "set"))

    assert official.content == data_set.content == read(str(tmp_path / "set" / "test.jsonl")).content
    assert official.content["answers"] == [["cat"]] * 3
    assert official.sha256 == data_set.sha256


def test_answers_that_are_not_as_squads(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "context": "b", "answers": ["b"]}))

    with pytest.raises(qsim.DataError, match=r"rows.jsonl: 'answers' should hold 'text', a list, as SQuAD's does$"):
        qsim.parse("question_answering").read(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("text", ["[]", "no json", '{"data": [{"title": "cats"}]}'])
def test_a_file_that_is_not_squads(tmp_path: Path, text: str) -> None:
    (tmp_path / "dev.json").write_text(text)

    with pytest.raises(qsim.DataError, match="dev.json is not SQuAD's JSON: "):
        qsim.parse("question_answering").read(str(tmp_path / "dev.json"))


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        (
            "question_answering",
            "^the model takes 64 tokens at most, not 384; lower it: --set question_answering.seqlen=N$",
        ),
        ("question_answering(8, stride=8)", "^question 0 does not fit windows of 8 tokens that share 8: "),
    ],
)
def test_windows_that_do_not_fit(evaluator: str, message: str) -> None:
    with pytest.raises(qsim.DataError, match=message):
        ask(Pointer("dog", "away"), [["dog"]] * 3, evaluator)


class TestQuestionAnswering(EvaluatorSuite):
    text = "question_answering(64, stride=8)"

    def loaded(self) -> qsim.LoadedModel:
        return qsim.LoadedModel(Pointer("cat", "cat"), BertTokenizer(vocab=vocabulary()))

    def data(self, evaluator: Any) -> qsim.Data:
        return cats([["cat"], ["on"], ["mat"]])
