"""Accuracy of texts in batches against one text at a time, and error messages for unsuitable texts and labels."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import torch
from architectures import SIZES, pretrained, write
from sklearn.metrics import accuracy_score, log_loss

import qsim_core as qsim

CLASSES = ["noun", "verb", "other"]
TEXTS = ["A", "A DOG BARKS", "RUN", "WALK AWAY, SAID HE", "BLUE", "THE END OF THE ROAD"]
LABELS = [0, 1, 1, 1, 2, 0]
NAMES = [CLASSES[label] for label in LABELS]
ROWS = "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in zip(TEXTS, NAMES, strict=True))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> qsim.LoadedModel:
    """Make a BERT with three classes, whose tokens are letters and whose padding is blanks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: n for n, name in enumerate(CLASSES)}}
        model: Any = pretrained("BertForSequenceClassification", **SIZES, **labels, initializer_range=0.5)()
    found = qsim.parse("bert").load(str(write(model, tmp_path_factory.mktemp("model"))), torch.float32)
    found.tokenizer.pad_token = " "
    return found


def data(labels: Any = LABELS, texts: list[str] = TEXTS) -> qsim.Data:
    return qsim.Data("words", {"text": texts, "label": labels}, "0" * 64)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_is_what_each_text_gives_by_itself(loaded: qsim.LoadedModel, batch_size: int) -> None:
    with torch.no_grad():
        logits = [loaded.model(torch.tensor([[ord(letter) - 32 for letter in text]])).logits for text in TEXTS]
    chances = torch.cat(logits).double().softmax(1).numpy()

    found = qsim.parse("accuracy").evaluate(loaded, data(), qsim.Run(batch_size=batch_size))

    assert found["accuracy"] == pytest.approx(accuracy_score(LABELS, chances.argmax(1)), abs=1e-12)
    assert found["nll"] == pytest.approx(log_loss(LABELS, chances, labels=range(3)), rel=1e-4)
    assert (found["top5"], found["majority"], found["texts"]) == (1.0, 0.5, 6.0)
    assert found.samples["accuracy"].shape == (6,)


def test_a_tokenizer_that_pads_on_the_left_moves_no_text(loaded: qsim.LoadedModel) -> None:
    left = copy.deepcopy(loaded)
    left.tokenizer.padding_side = "left"

    alone, together = (qsim.parse("accuracy").evaluate(left, data(), qsim.Run(batch_size=many)) for many in (1, 6))

    assert together["nll"] == pytest.approx(alone["nll"], rel=1e-5)


def test_equal_logits_choose_no_class(loaded: qsim.LoadedModel) -> None:
    equal = copy.deepcopy(loaded)
    for part in equal.model.classifier.parameters():  # type: ignore[operator, union-attr]
        part.data.zero_()

    found = qsim.parse("accuracy").evaluate(equal, data(), qsim.Run())

    assert (found["accuracy"], found["top5"]) == (0, 1)


def test_names_are_labels_too_and_a_limit_takes_the_first(loaded: qsim.LoadedModel) -> None:
    accuracy = qsim.parse("accuracy")

    assert accuracy.evaluate(loaded, data(NAMES), qsim.Run()) == accuracy.evaluate(loaded, data(), qsim.Run())
    assert accuracy.evaluate(loaded, data(), qsim.Run(limit=2)) == accuracy.evaluate(
        loaded, data(LABELS[:2], TEXTS[:2]), qsim.Run()
    )


def test_a_text_is_cut_off_and_the_protocol_says_so(loaded: qsim.LoadedModel) -> None:
    short = qsim.parse("accuracy(seqlen=3)")

    assert short.example(loaded, data(texts=["A DOG BARKS"]))["input_ids"].tolist() == [[33, 0, 36]]
    assert short.protocol(loaded) == (
        "top-1 accuracy over 3 classes, texts cut off after 3 tokens and padded to the longest of a batch"
    )
    assert "after 64 tokens" in qsim.parse("accuracy").protocol(loaded)
    with pytest.raises(qsim.DataError, match="^the model takes 64 tokens at most, not 65$"):
        qsim.parse("accuracy(seqlen=65)").example(loaded, data())


def test_calibration_draws_single_texts_by_a_seed(loaded: qsim.LoadedModel) -> None:
    first, again = (qsim.parse("accuracy").calibration(loaded, data(), 4, 5, 3) for _ in range(2))

    assert [batch["input_ids"].shape[0] for batch in first] == [1] * 4
    assert max(batch["input_ids"].shape[1] for batch in first) == 5
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))


def test_a_classifier_on_disk_is_evaluated_on_a_file_of_json_lines(loaded: qsim.LoadedModel, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "words.jsonl").write_text(ROWS)
    host = qsim.Host()
    recipe = qsim.Recipe.of({"model": str(tmp_path), "weights": "int8", "activations": "int8"}, host)

    result = qsim.evaluate(recipe, host=host, data=str(tmp_path / "words.jsonl"), run=qsim.Run(batch_size=3))

    assert result.metric == "accuracy"
    assert result.baseline == qsim.parse("accuracy").evaluate(loaded, data(), qsim.Run(batch_size=3))
    assert result.data.sha256 == hashlib.sha256(json.dumps([TEXTS, NAMES]).encode()).hexdigest()
    assert (result.audit.covered, result.audit.found) == (18, 18)


class TestRead:
    """Sources of texts."""

    def test_a_directory_of_data_files_is_read_by_datasets(self, tmp_path: Path) -> None:
        (tmp_path / "test.jsonl").write_text(ROWS.replace('"text"', '"sentence"'))

        read = qsim.parse("accuracy(text='sentence')").read(str(tmp_path))

        assert read.content == {"text": TEXTS, "label": NAMES}
        (tmp_path / "one.jsonl").write_text(ROWS)
        assert qsim.parse("accuracy").read(str(tmp_path / "one.jsonl")).sha256 == read.sha256

    def test_a_table_is_read_as_lines_are(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text(ROWS)
        datasets.Dataset.from_dict({"text": TEXTS, "label": NAMES}).to_csv(tmp_path / "rows.csv")

        lines, table = (qsim.parse("accuracy").read(str(tmp_path / f"rows.{end}")) for end in ("jsonl", "csv"))

        assert table.sha256 == lines.sha256

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "{} has no texts"),
            ('{"text": "A"}', "{}, row 1: expected a text 'text' and a label 'label'"),
            ('{"text": "A", "label": 1}\n{"text": 2, "label": 1}', "{}, row 2: expected a text 'text' and a label 'label'"),
            ("[1]", "{}, row 1: expected a text 'text' and a label 'label'"),
            ("text,label", "cannot read {} as JSON lines: Expecting value: line 1 column 1 (char 0)"),
        ],
    )  # fmt: skip
    def test_a_file_of_other_things(self, content: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(content)

        with pytest.raises(qsim.DataError) as error:
            qsim.parse("accuracy").read(str(tmp_path / "a.jsonl"))

        assert str(error.value) == message.format(tmp_path / "a.jsonl")


class TestWrong:
    """Error messages for models, tokenizers and labels that do not fit."""

    @pytest.mark.parametrize("label", [3, -1, "adverb", 0.5, [1, 0]])
    def test_a_label_that_is_no_class(self, loaded: qsim.LoadedModel, label: Any) -> None:
        with pytest.raises(qsim.DataError) as error:
            qsim.parse("accuracy").evaluate(loaded, data([0, label], TEXTS[:2]), qsim.Run())

        assert str(error.value) == f"label {label!r} of text 1 is not one of the model's 3 classes, 0 to 2"

    def test_a_model_without_a_tokenizer(self, loaded: qsim.LoadedModel) -> None:
        with pytest.raises(qsim.DataError) as error:
            qsim.parse("accuracy").example(qsim.LoadedModel(loaded.model), data())

        assert str(error.value) == (
            "accuracy of texts needs a tokenizer, and this BertForSequenceClassification was loaded without one"
        )

    def test_images_for_a_model_of_texts(self, loaded: qsim.LoadedModel) -> None:
        with pytest.raises(qsim.DataError, match="^accuracy needs an image processor, and this Bert"):
            qsim.parse("accuracy").example(loaded, qsim.Data("images", {"image": [0], "label": [0]}, ""))

    def test_a_tokenizer_that_cannot_pad(self, tmp_path: Path) -> None:
        folder = write(pretrained("BertForSequenceClassification", **SIZES)(), tmp_path)
        unpadded = qsim.parse("bert").load(str(folder), torch.float32)
        two = data([0, 1], TEXTS[:2])

        assert qsim.parse("accuracy").evaluate(unpadded, two, qsim.Run(batch_size=1))["texts"] == 2
        with pytest.raises(qsim.DataError) as error:
            qsim.parse("accuracy").evaluate(unpadded, two, qsim.Run())
        assert str(error.value) == (
            "the tokenizer has no padding token, so that a batch holds one text; give --batch-size 1"
        )

    def test_a_tokenizer_that_pads_with_another_token_than_the_model(self, tmp_path: Path) -> None:
        folder = write(pretrained("GPT2ForSequenceClassification", **SIZES, num_labels=3)(), tmp_path)
        mixed = qsim.parse("generic").load(str(folder), torch.float32)
        mixed.tokenizer.pad_token = "B"

        assert qsim.parse("accuracy").evaluate(mixed, data(), qsim.Run(batch_size=1))["texts"] == 6
        with pytest.raises(
            qsim.DataError, match="^the tokenizer pads with token 34, and the model's configuration names token 0; "
        ):
            qsim.parse("accuracy").evaluate(mixed, data([0, 1], TEXTS[:2]), qsim.Run())

    def test_a_regression(self, tmp_path: Path) -> None:
        folder = write(pretrained("BertForSequenceClassification", **SIZES, num_labels=1)(), tmp_path)

        with pytest.raises(qsim.DataError) as error:
            qsim.parse("accuracy").evaluate(qsim.parse("bert").load(str(folder), torch.float32), data(), qsim.Run())

        assert str(error.value) == "the model has one output and no classes; use the evaluator fidelity"


class TestNames:
    """Labels by name where the data and the model name their classes."""

    SWAPPED = ("OTHER", "noun", "Verb")
    NUMBERS = (1, 2, 2, 2, 0, 1)

    def measured(self, loaded: qsim.LoadedModel, names: Any, labels: Any = NUMBERS, options: str = "") -> Any:
        named = qsim.Data("words", {"text": TEXTS, "label": labels, "names": names}, "")
        return qsim.parse(f"accuracy{options}").evaluate(loaded, named, qsim.Run())

    @pytest.fixture
    def unnamed(self, loaded: qsim.LoadedModel) -> qsim.LoadedModel:
        found = copy.deepcopy(loaded)
        config: Any = found.model.config
        config.id2label = {number: f"LABEL_{number}" for number in range(3)}
        config.label2id = {}
        return found

    def test_other_numbers_and_other_letters_are_the_same_classes(self, loaded: qsim.LoadedModel) -> None:
        right = qsim.parse("accuracy").evaluate(loaded, data(), qsim.Run())

        assert self.measured(loaded, self.SWAPPED) == right
        assert self.measured(loaded, ("noun", "VERB", "other"), LABELS) == right
        assert self.measured(loaded, self.SWAPPED, LABELS, "(by_name=false)") == right

    def test_a_table_with_named_classes_is_scored_by_name_and_the_result_says_so(
        self, loaded: qsim.LoadedModel, tmp_path: Path
    ) -> None:
        loaded.model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
        loaded.tokenizer.save_pretrained(tmp_path / "model")
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(self.SWAPPED)))
        rows = pyarrow.table({"text": TEXTS, "label": self.NUMBERS}, schema=features.arrow_schema)
        pyarrow.parquet.write_table(rows, tmp_path / "words.parquet")

        recipe = {"model": str(tmp_path / "model"), "weights": "int8"}
        result = qsim.evaluate(recipe, data=str(tmp_path / "words.parquet"), run=qsim.Run(batch_size=3))

        assert result.baseline == qsim.parse("accuracy").evaluate(loaded, data(), qsim.Run(batch_size=3))
        assert result.protocol.endswith("longest of a batch, labels matched by name")

    @pytest.mark.parametrize(
        ("content", "how"),
        [
            ({"label": NAMES}, "labels matched by name"),
            ({"label": LABELS}, "labels taken by number, as the data do not name their classes"),
            ({"label": [0, 1], "names": ["verb", "noun"]}, "labels matched by name, 1 classes of the model not in the data"),
        ],
    )  # fmt: skip
    def test_the_protocol_says_which(self, loaded: qsim.LoadedModel, content: Any, how: str) -> None:
        found = qsim.parse("accuracy").protocol_for(loaded, qsim.Data("words", {"text": TEXTS, **content}, ""))

        assert found.endswith(f"longest of a batch, {how}")

    def test_a_model_without_names_is_scored_by_number(self, unnamed: qsim.LoadedModel) -> None:
        named = qsim.Data("words", {"text": TEXTS, "label": LABELS, "names": CLASSES}, "")
        accuracy = qsim.parse("accuracy")

        assert accuracy.evaluate(unnamed, named, qsim.Run()) == accuracy.evaluate(unnamed, data(), qsim.Run())
        assert accuracy.protocol_for(unnamed, named).endswith("by number, as the model does not name its classes")

    def test_a_number_for_a_name_is_the_models_number(self, unnamed: qsim.LoadedModel) -> None:
        """Directories of images sort the name 10 before 2."""
        assert self.measured(unnamed, ("2", "0", "1")) == qsim.parse("accuracy").evaluate(unnamed, data(), qsim.Run())

    def test_two_classes_of_one_name_keep_their_places(self, loaded: qsim.LoadedModel) -> None:
        doubled = copy.deepcopy(loaded)
        config: Any = doubled.model.config
        config.id2label, config.label2id = {0: "crane", 1: "crane", 2: "other"}, {"crane": 1, "other": 2}
        right = qsim.parse("accuracy").evaluate(loaded, data(), qsim.Run())

        assert self.measured(doubled, ("crane", "crane", "other"), LABELS) == right
        with pytest.raises(
            qsim.DataError, match=r"^label 'crane' is the name of several classes of the model: \[0, 1\]$"
        ):
            self.measured(doubled, None, ["crane"] * 6)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("noun", "verb", "adverb"), "the data have a class 'adverb', and the model does not (noun, verb, other); rename the classes, or take them by number: --set accuracy.by_name=false"),
            (("noun", "verb", "other", "Noun"), "the data have 2 classes for the model's 'noun'; merge them"),
        ],
    )  # fmt: skip
    def test_other_names(self, loaded: qsim.LoadedModel, names: Any, message: str) -> None:
        with pytest.raises(qsim.DataError) as error:
            self.measured(loaded, names)

        assert str(error.value) == message

    def test_a_configuration_that_contradicts_itself(self, loaded: qsim.LoadedModel) -> None:
        wrong = copy.deepcopy(loaded)
        config: Any = wrong.model.config
        config.label2id = {"noun": 1, "verb": 0, "other": 2}

        with pytest.raises(qsim.DataError) as error:
            self.measured(wrong, self.SWAPPED)

        assert (
            str(error.value) == "the model's config contradicts itself: class 'noun' is 0 in id2label and 1 in label2id"
        )
