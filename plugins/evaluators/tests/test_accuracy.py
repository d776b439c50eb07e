"""Accuracy against scikit-learn and a plain loop, and error messages for unsuitable images and labels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import EvaluatorSuite

SIZE, CLASSES = 4, 7
GREY = [np.asarray(image) for image in np.random.default_rng(0).integers(0, 256, (50, SIZE, SIZE), dtype=np.uint8)]
LABELS = np.random.default_rng(1).integers(0, CLASSES, 50).tolist()


class Linear(nn.Module):
    """A classifier whose logits are a linear function of the pixels."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            num_channels=channels, image_size=SIZE, num_labels=CLASSES, label2id={str(i): i for i in range(CLASSES)}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = nn.Linear(channels * SIZE * SIZE, CLASSES)

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(pixel_values.flatten(1)))


class ForImageClassification(Linear):
    """A class whose name tells that it classifies images."""


def to_unit(images: list[Any], return_tensors: str) -> dict[str, Tensor]:
    """Process images: pixels from 0 to 1, channels first, no resizing."""
    arrays = [
        np.asarray(image)[None] if image.mode == "L" else np.asarray(image).transpose(2, 0, 1) for image in images
    ]
    return {"pixel_values": torch.tensor(np.stack(arrays)) / 255}


def data(images: Any = GREY, labels: Any = LABELS) -> qsim.Data:
    return qsim.Data("noise", {"image": images, "label": labels}, "0" * 64)


def measure(images: Any = GREY, labels: Any = LABELS, channels: int = 1, **run: Any) -> dict[str, float]:
    loaded = qsim.LoadedModel(Linear(channels), None, to_unit)
    return qsim.parse("accuracy").evaluate(loaded, data(images, labels), qsim.Run(**run))  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_it_is_what_scikit_learn_gives(batch_size: int) -> None:
    pixels = torch.tensor(np.stack(GREY)).unsqueeze(1) / 255
    with torch.no_grad():
        chances = Linear()(pixels).logits.double().softmax(1).numpy()

    found = measure(batch_size=batch_size)

    assert found["accuracy"] == pytest.approx(accuracy_score(LABELS, chances.argmax(1)), abs=1e-12)
    assert found["top5"] == pytest.approx(top_k_accuracy_score(LABELS, chances, k=5, labels=range(CLASSES)), abs=1e-12)
    assert found["nll"] == pytest.approx(log_loss(LABELS, chances, labels=range(CLASSES)), rel=1e-6)
    assert found["images"] == 50


def test_limit_takes_the_first_images() -> None:
    assert measure(limit=10) == measure(GREY[:10], LABELS[:10])


def test_labels_may_be_the_models_own_names() -> None:
    assert measure(labels=[str(label) for label in LABELS]) == measure()


def test_grey_images_become_rgb_and_arrays_are_images() -> None:
    as_rgb = [np.stack([image] * 3, 2) for image in GREY]

    assert measure(channels=3) == measure(as_rgb, channels=3)
    assert measure(channels=3) == measure([Image.fromarray(image) for image in as_rgb], channels=3)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GREY, [3, 7, 0], "label 7 of image 1 is not one of the model's 7 classes, 0 to 6"),
        (GREY, [3, -1, 0], "label -1 of image 1 is not one of the model's 7 classes, 0 to 6"),
        (GREY, ["3", "cat"], "label 'cat' of image 1 is not one of the model's 7 classes, 0 to 6"),
        ([Image.new("RGB", (4, 4))], [0], "image 0 has mode RGB, the model takes one channel; convert the images to 'L'"),
        ([np.zeros((5, 4), "uint8")], [0], "image 0 becomes 1 by 5 by 4, the model takes 1 by 4 by 4 (channels, height, width): its processor does not fit it"),
        ([np.zeros((4, 4), "float32")], [0], "image 0 is float32 of shape (4, 4); expected uint8, [height, width] or [height, width, 3]"),
        ([np.zeros((4, 4, 2), "uint8")], [0], "image 0 is uint8 of shape (4, 4, 2); expected uint8, [height, width] or [height, width, 3]"),
    ],
)  # fmt: skip
def test_images_and_labels_that_do_not_fit_the_model(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(qsim.DataError) as error:
        measure(images[: len(labels)], labels)

    assert str(error.value) == message


def test_an_evaluator_that_does_not_fit_says_what_fits() -> None:
    loaded = qsim.LoadedModel(ForImageClassification(), None, to_unit)

    for evaluator in ("perplexity", "masked_lm", "retrieval", "denoising"):
        with pytest.raises(qsim.DataError) as error:
            qsim.parse(evaluator).example(loaded, qsim.Data("words", "some words", ""))
        assert str(error.value) == f"{evaluator} does not fit a ForImageClassification; accuracy and fidelity do"


def test_a_model_without_a_processor() -> None:
    with pytest.raises(
        qsim.DataError, match="^accuracy needs an image processor, and this Linear was loaded without one$"
    ):
        qsim.parse("accuracy").example(qsim.LoadedModel(Linear()), data())


def test_calibration_draws_single_images_by_a_seed() -> None:
    loaded = qsim.LoadedModel(Linear(), None, to_unit)
    first, again, other = (qsim.parse("accuracy").calibration(loaded, data(), 6, None, seed) for seed in (0, 0, 1))

    assert [batch["pixel_values"].shape for batch in first] == [(1, 1, SIZE, SIZE)] * 6
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, other, strict=True))
    with pytest.raises(qsim.DataError, match="^images have no length; leave --calibration-seqlen out$"):
        qsim.parse("accuracy").calibration(loaded, data(), 6, 128, 0)


class TestRead:
    """Sources of images."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        for label, shade in (("0", 10), ("3", 200)):
            (tmp_path / "test" / label).mkdir(parents=True)
            Image.new("L", (SIZE, SIZE), shade).save(tmp_path / "test" / label / "a.png")
        return str(tmp_path)

    def test_a_directory_of_images_for_each_label(self, folder: str) -> None:
        read = qsim.parse("accuracy").read(folder)

        assert [image.getpixel((0, 0)) for image in read.content["image"]] == [10, 200]
        assert read.sha256 == qsim.parse("accuracy").read(folder).sha256
        loaded = qsim.LoadedModel(Linear(), None, to_unit)
        assert qsim.parse("accuracy").evaluate(loaded, read, qsim.Run())["images"] == 2

    def test_a_directory_has_the_name_of_its_class(self, folder: str) -> None:
        loaded = qsim.LoadedModel(Linear(), None, to_unit)
        read, accuracy = qsim.parse("accuracy").read(folder), qsim.parse("accuracy")
        by_hand = qsim.Data("by hand", {"image": read.content["image"], "label": [0, 3]}, "")

        assert accuracy.evaluate(loaded, read, qsim.Run()) == accuracy.evaluate(loaded, by_hand, qsim.Run())
        assert "5 classes of the model not in the data" in accuracy.protocol_for(loaded, read)

    def test_a_change_of_one_pixel_changes_the_fingerprint(self, folder: str) -> None:
        before = qsim.parse("accuracy").read(folder).sha256
        with Image.open(Path(folder) / "test" / "3" / "a.png") as image:
            image.putpixel((1, 1), 0)
            image.save(Path(folder) / "test" / "3" / "a.png")

        assert qsim.parse("accuracy").read(folder).sha256 != before

    def test_a_column_that_is_missing(self, folder: str) -> None:
        with pytest.raises(qsim.DataError, match="has no column 'img'; it has image, label$"):
            qsim.parse("accuracy(img)").read(folder)

    def test_a_column_of_other_things(self, tmp_path: Path) -> None:
        (tmp_path / "test.jsonl").write_text(json.dumps({"image": "a.png", "label": 1}))

        with pytest.raises(qsim.DataError, match="^column 'image' of .* holds .*string.*, not images$"):
            qsim.parse("accuracy").read(str(tmp_path))


class TestAccuracy(EvaluatorSuite):
    text = "accuracy"

    def loaded(self) -> qsim.LoadedModel:
        return qsim.LoadedModel(Linear(), None, to_unit)

    def data(self, evaluator: Any) -> qsim.Data:
        return data()
