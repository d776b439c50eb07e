"""`question_answering(seqlen, stride)`: F1 and exact match of answers that a model finds in a text (SQuAD)."""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from qsim_transformers.tokens import check_ids
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.evaluation.metrics import finite_outputs
from qsim_core.files import place
from qsim_evaluators.fitting import check, device, longest
from qsim_evaluators.text import check_padding, holds_lines, on_the_right, read_rows

LONGEST = 512
LIKELIEST = 20
"""Number of likely first tokens of an answer, and of likely last tokens, that are considered in each window."""
COLUMNS = ("question", "context", "answers")


class QuestionAnswering(Evaluator):
    """Exact match and F1 of SQuAD v1.1 and v2 (arXiv 1606.05250, 1806.03822), from 0 to 1, as in SQuAD's own script.

    A context is read in windows of `seqlen` tokens, which begin with the question. Neighbouring windows share `stride`
    tokens. The answer is the span of at most `longest_answer` tokens with the largest sum of start and end logits in
    any window. If some questions of the data have no answer (v2), the model may answer with no text. It does so if the
    sum of the logits at the first token is larger in every window. Of equally likely answers the worst one counts.

    Data are a mapping with three lists: `question`, `context` and `answers`. Answers of a question are a list of texts,
    which is empty if the question has no answer.
    """

    name = "question_answering"
    metric = "f1"
    higher_is_better = True
    seqlen: PositiveInt = Field(384, description="tokens of a window")
    stride: PositiveInt = Field(128, description="tokens that neighbouring windows share")
    longest_answer: PositiveInt = Field(30, description="tokens of an answer at most")

    def read(self, source: str, split: str = "test") -> Data:
        """Read SQuAD's own JSON from a file, or its columns from a file of rows or from `datasets`."""
        path = place(source)
        if holds_lines(path) and path.suffix != ".jsonl":
            return _data(source, _official(path))
        rows = read_rows(source, list(COLUMNS), split)
        try:
            return _data(source, [(row["question"], row["context"], list(row["answers"]["text"])) for row in rows])
        except (KeyError, TypeError):
            raise DataError(f"{source}: 'answers' should hold 'text', a list, as SQuAD's does") from None

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Draw questions at random, and return the first window of each, one in a batch."""
        many = len(data.content["question"])
        chosen = torch.randint(many, (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
        windows = (self._windows(loaded, data, place, length, padded=False) for place in chosen)
        return [self._inputs(loaded, window, slice(0, 1)) for window in windows]

    def training(self, loaded: LoadedModel, data: Data, length: int | None) -> list[dict[str, Tensor]]:
        """Return each window of each question. The labels are the first and the last token of its first answer.

        The answer is where its text stands first in the context. In a window without all of it both labels are the
        first token.
        """
        found = []
        for number, answers in enumerate(data.content["answers"]):
            windows = self._windows(loaded, data, number, length)
            inputs = self._inputs(loaded, windows, slice(None))
            begin = data.content["context"][number].find(answers[0]) if answers else -1
            for index in range(len(windows["input_ids"])):
                first, last = _span(windows, index, begin, begin + len(answers[0])) if begin >= 0 else (0, 0)
                labels = {"start_positions": torch.tensor(first), "end_positions": torch.tensor(last)}
                found.append({name: value[index] for name, value in inputs.items()} | labels)
        return found

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return the first window of the first question."""
        return self._inputs(loaded, self._windows(loaded, data, 0), slice(0, 1))

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute `f1` and `exact_match`, and the number of `questions`."""
        places = list(range(len(data.content["question"])))[: run.limit]
        may_be_none = not all(data.content["answers"])
        exact, f1 = [], []
        with torch.no_grad():
            for place in run.track(places, len(places), "questions"):
                with finite_outputs(loaded.model) as finite:
                    answers, scored = self._answers(loaded, data, place, run.batch_size, may_be_none)
                truths = data.content["answers"][place] or [""]
                scores = (max(overlap(answer, truth) for truth in truths) for answer in answers)
                right = (any(normalized(answer) == normalized(truth) for truth in truths) for answer in answers)
                f1.append(min(scores) if finite() and scored else math.nan)
                exact.append(float(all(right)))
        return Metrics({"f1": torch.tensor(f1), "exact_match": torch.tensor(exact)}, counts={"questions": len(places)})

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe the windows in words."""
        return f"SQuAD's F1 and exact match, windows of {self.seqlen} tokens that share {self.stride}"

    def _answers(
        self, loaded: LoadedModel, data: Data, place: int, at_once: int, may_be_none: bool
    ) -> tuple[set[str], bool]:
        """Return the likeliest answer, or all that are equally likely, and false if it has no finite score."""
        windows = self._windows(loaded, data, place)
        best, texts, none = float("-inf"), {""}, float("inf")
        for first in range(0, len(windows["input_ids"]), at_once):
            part = slice(first, first + at_once)
            output = loaded.model(**self._inputs(loaded, windows, part))
            starts, ends = output.start_logits.double().cpu(), output.end_logits.double().cpu()
            none = min(none, float((starts[:, 0] + ends[:, 0]).min()))
            for index, (start, end) in enumerate(zip(starts, ends, strict=True), first):
                offsets = windows["offset_mapping"][index]
                score, spans = self._likeliest(start, end, windows.sequence_ids(index))
                found = {data.content["context"][place][offsets[a][0] : offsets[b][1]] for a, b in spans}
                if spans and score >= best:
                    best, texts = score, found if score > best else texts | found
        scored = max(none, best) < math.inf
        if not may_be_none or none < best:
            return texts, scored
        return ({""} if none > best else {"", *texts}), scored

    def _likeliest(self, start: Tensor, end: Tensor, parts: list[int | None]) -> tuple[float, list[list[int]]]:
        """Return the largest sum of logits of a span of the context, and the first and last token of each such span."""
        inside = torch.tensor([part == 1 for part in parts])
        first, last = ((_likely(logits[: len(parts)]) & inside).nonzero() for logits in (start, end))
        sums = start[first] + end[last].T
        fits = (first <= last.T) & (first + self.longest_answer > last.T)
        best = float(sums[fits].max()) if fits.any() else float("-inf")
        return best, [[int(first[a]), int(last[b])] for a, b in ((sums == best) & fits).nonzero().tolist()]

    def _windows(
        self, loaded: LoadedModel, data: Data, place: int, length: int | None = None, padded: bool = True
    ) -> Any:
        check(self.name, loaded)
        length = length or self.seqlen
        if length > longest(loaded, LONGEST):
            raise DataError(
                f"the model takes {longest(loaded, LONGEST)} tokens at most, not {length}; "
                f"lower it: --set {self.name}.seqlen=N"
            )
        question, context = (data.content[column][place] for column in ("question", "context"))
        try:
            return loaded.tokenizer(
                question.lstrip(), context, truncation="only_second", max_length=length, stride=self.stride,
                return_overflowing_tokens=True, return_offsets_mapping=True, padding="max_length" if padded else False,
                **on_the_right(loaded),
            )  # fmt: skip
        except Exception as error:  # tokenizers raise plain exceptions
            fit = f"windows of {length} tokens that share {self.stride}"
            raise DataError(f"question {place} does not fit {fit}: {str(error).rstrip(',')}") from None

    @staticmethod
    def _inputs(loaded: LoadedModel, windows: Any, part: slice) -> dict[str, Any]:
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in windows]
        inputs = {name: torch.tensor(windows[name][part], device=device(loaded)) for name in names}
        check_ids(loaded.model, inputs["input_ids"])
        check_padding(loaded, inputs)
        return inputs


def _span(windows: Any, index: int, begin: int, end: int) -> tuple[int, int]:
    """The first and last token of a part of the context in a window; 0 and 0 if the window has not all of it."""
    offsets = windows["offset_mapping"][index]
    inside = [
        token
        for token, (part, (a, b)) in enumerate(zip(windows.sequence_ids(index), offsets, strict=True))
        if part == 1 and a < end and b > begin
    ]
    whole = inside and offsets[inside[0]][0] <= begin and offsets[inside[-1]][1] >= end
    return (inside[0], inside[-1]) if whole else (0, 0)


def _likely(logits: Tensor) -> Tensor:
    """Mark the `LIKELIEST` largest logits, and those that equal the last of them."""
    return logits >= logits.topk(min(LIKELIEST, len(logits))).values[-1]


def normalized(text: str) -> str:
    """Lower the case, and remove punctuation, articles and extra white space, like SQuAD's `normalize_answer`."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def overlap(answer: str, truth: str) -> float:
    """Compute the F1 of words, like SQuAD's `compute_f1`.

    If one of the two texts has no words, the result is 1 if the other has none either, else 0.
    """
    found, wanted = normalized(answer).split(), normalized(truth).split()
    if not (found and wanted):
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def _data(name: str, rows: list[tuple[str, str, list[str]]]) -> Data:
    if not rows:
        raise DataError(f"{name} has no questions")
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Data(name, dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)), digest)


def _official(path: Path) -> list[tuple[str, str, list[str]]]:
    try:
        return [
            (question["question"], paragraph["context"], [answer["text"] for answer in question["answers"]])
            for article in json.loads(path.read_text(encoding="utf-8"))["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not SQuAD's JSON: {type(error).__name__} {error}") from None
