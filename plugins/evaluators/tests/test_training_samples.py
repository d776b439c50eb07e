"""Training samples of evaluators: the loss of training is the loss that the evaluator measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qsim_core as qsim

FOX = qsim.Data.of_text("fox", "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 8)
SHORT = qsim.Data.of_text("short", "A few words.")
NOISE = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
IMAGES = qsim.Data("noise", {"image": list(NOISE), "label": [3, 1, 4, 1, 5]}, "0" * 64)
WORDS = qsim.Data(
    "words", {"text": ["A module.", "Return the sum of a and b.", "A class"], "label": [0, 2, 1]}, "0" * 64
)
CASES = [
    ("opt-tiny", "perplexity(32)", FOX),
    ("bert-tiny", "masked_lm(32)", FOX),
    ("vit-tiny", "accuracy", IMAGES),
    ("bert-tiny-classifier", "accuracy(seqlen=16)", WORDS),
]


def load(model: str) -> qsim.LoadedModel:
    return qsim.parse("zoo.zoo").load(model, torch.float32)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("model", "text", "data"), CASES)
def test_the_mean_loss_of_the_samples_is_the_nll_that_is_measured(model: str, text: str, data: qsim.Data) -> None:
    loaded, evaluator = load(model), qsim.parse(text)
    measured = evaluator.evaluate(loaded, data, qsim.Run())

    samples = evaluator.training(loaded, data, None)
    with torch.no_grad():
        losses = [
            loaded.model(**{name: value.unsqueeze(0) for name, value in sample.items()}).loss.item()
            for sample in samples
        ]

    assert len(losses) == len(samples) > 2
    assert sum(losses) / len(losses) == pytest.approx(measured["nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "text", "data", "length", "message"),
    [
        ("opt-tiny", "perplexity", FOX, 257, "training windows of 257 tokens: the model takes 2 to 256"),
        (
            "opt-tiny",
            "perplexity",
            SHORT,
            256,
            "short has 7 tokens, fewer than one training window of 256; lower --seqlen",
        ),
        ("bert-tiny", "masked_lm", FOX, 2, "windows of 2 tokens: the model takes 3 to 64"),
        ("vit-tiny", "accuracy", IMAGES, 8, "images have no length; leave --seqlen out"),
    ],
)
def test_lengths_that_do_not_fit(model: str, text: str, data: qsim.Data, length: int, message: str) -> None:
    with pytest.raises(qsim.DataError) as error:
        qsim.parse(text).training(load(model), data, length)

    assert str(error.value) == message


def test_an_evaluator_without_samples_to_train_on_says_so() -> None:
    with pytest.raises(qsim.DataError, match=r"^denoising makes no training samples; use an evaluator that does, or"):
        qsim.parse("denoising").training(load("ddpm-tiny"), FOX, None)
