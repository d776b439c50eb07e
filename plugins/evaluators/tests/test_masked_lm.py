"""Masked tokens against a plain loop, on a model small enough to write down."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import EvaluatorSuite

TEXT = "the quick brown fox jumps over the lazy dog " * 4
CLS, SEP, MASK = 1, 2, 3


class Neighbours(nn.Module):
    """A model whose logits of a letter depend on the letters on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))
        self.config = SimpleNamespace(max_position_embeddings=32)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids.roll(1, 1)] + self.table[input_ids.roll(-1, 1)])


class Letters:
    """A tokenizer of letters."""

    cls_token_id, sep_token_id, mask_token_id = CLS, SEP, MASK

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])


@pytest.fixture
def loaded() -> qsim.LoadedModel:
    return qsim.LoadedModel(Neighbours(), Letters())


def fox(text: str = TEXT) -> qsim.Data:
    return qsim.Data.of_text("fox", text)


def by_hand(model: Any, seqlen: int, share: float, seed: int) -> tuple[float, float, int]:
    """Compute the metrics for one masked letter after another."""
    inner = seqlen - 2
    windows = [TEXT[start : start + inner] for start in range(0, len(TEXT) - inner + 1, inner)]
    lots = torch.rand(len(windows), inner, generator=torch.Generator().manual_seed(seed)).tolist()
    total, right, count = 0.0, 0, 0
    for window, lot in zip(windows, lots, strict=True):
        masked = sorted(range(inner), key=lambda place: -lot[place])[: max(1, round(share * inner))]
        seen = [CLS, *(MASK if place in masked else ord(letter) for place, letter in enumerate(window)), SEP]
        for place in masked:
            logits = model.table[seen[place]] + model.table[seen[(place + 2) % seqlen]]
            total -= logits.double().log_softmax(-1)[ord(window[place])].item()
            right += logits.argmax().item() == ord(window[place])
            count += 1
    return total / count, right / count, count


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(("seqlen", "share", "seed"), [(32, 0.15, 0), (10, 0.15, 0), (10, 0.5, 7), (3, 0.1, 1)])
def test_it_is_what_a_plain_loop_gives(
    loaded: qsim.LoadedModel, seqlen: int, share: float, seed: int, batch_size: int
) -> None:
    evaluator = qsim.parse(f"masked_lm({seqlen}, share={share}, seed={seed})")

    found = evaluator.evaluate(loaded, fox(), qsim.Run(batch_size=batch_size))

    nll, accuracy, tokens = by_hand(loaded.model, seqlen, share, seed)
    assert found["tokens"] == tokens
    assert found["nll"] == pytest.approx(nll, rel=1e-6)
    assert found["masked_perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(("logit", "accuracy"), [(0.0, 0), (math.nan, math.nan)])
def test_equal_logits_predict_nothing_and_nan_has_no_score(
    loaded: qsim.LoadedModel, logit: float, accuracy: float
) -> None:
    loaded.model.table.data.fill_(logit)

    found = qsim.parse("masked_lm(10)").evaluate(loaded, fox(), qsim.Run())

    assert found["accuracy"] == pytest.approx(accuracy, nan_ok=True)


def test_the_masks_are_the_same_whatever_the_run(loaded: qsim.LoadedModel) -> None:
    evaluator = qsim.parse("masked_lm(10)")

    assert evaluator.evaluate(loaded, fox(), qsim.Run(seed=3)) == evaluator.evaluate(loaded, fox(), qsim.Run(seed=4))
    first = evaluator.evaluate(loaded, fox(), qsim.Run(limit=2))
    whole = evaluator.evaluate(loaded, fox(), qsim.Run())
    assert torch.equal(first.samples["nll"], whole.samples["nll"][:2])


def test_the_protocol_in_words(loaded: qsim.LoadedModel) -> None:
    assert qsim.parse("masked_lm").protocol(loaded) == (
        "perplexity of masked tokens, 15% of each non-overlapping window of 32 tokens of the concatenated text, "
        "places drawn by seed 0"
    )


def test_calibration_windows_are_masked_too(loaded: qsim.LoadedModel) -> None:
    batches = qsim.parse("masked_lm").calibration(loaded, fox(), 3, 12, seed=0)

    assert [batch["input_ids"].shape for batch in batches] == [(1, 12)] * 3
    assert [(batch["input_ids"] == MASK).sum().item() for batch in batches] == [2, 2, 2]
    assert [batch["input_ids"][0, [0, -1]].tolist() for batch in batches] == [[CLS, SEP]] * 3


@pytest.mark.parametrize(
    ("evaluator", "text", "message"),
    [
        ("masked_lm(33)", TEXT, "windows of 33 tokens: the model takes 3 to 32"),
        ("masked_lm(32)", "fox", "fox has 3 tokens, fewer than one window of 30; lower it: --set masked_lm.seqlen=N"),
    ],
)
def test_windows_that_do_not_fit(loaded: qsim.LoadedModel, evaluator: str, text: str, message: str) -> None:
    with pytest.raises(qsim.DataError, match=f"^{message}$"):
        qsim.parse(evaluator).evaluate(loaded, fox(text), qsim.Run())


def test_a_tokenizer_without_a_mask(loaded: qsim.LoadedModel) -> None:
    loaded.tokenizer.mask_token_id = None

    with pytest.raises(qsim.DataError, match="^masked_lm needs a tokenizer with a mask token; perplexity may fit"):
        qsim.parse("masked_lm").evaluate(loaded, fox(), qsim.Run())


@pytest.mark.parametrize("text", ["masked_lm(2)", "masked_lm(share=0)", "masked_lm(share=1)"])
def test_options_that_measure_nothing_are_refused(text: str) -> None:
    with pytest.raises(qsim.SpecError):
        qsim.parse(text)


class TestMaskedLM(EvaluatorSuite):
    text = "masked_lm"

    def loaded(self) -> qsim.LoadedModel:
        return qsim.LoadedModel(Neighbours(), Letters())
