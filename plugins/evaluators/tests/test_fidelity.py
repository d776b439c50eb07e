"""Fidelity against written-out formulas, on any model and any input."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import EvaluatorSuite

WIDTH, CLASSES = 6, 5


class Classifier(nn.Module):
    """A model that returns logits of vectors, or of sequences of vectors."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        weight = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(weight + (scale - 1) * noise)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=x.to(self.weight.dtype) @ self.weight.T)


def inputs(*shape: int, many: int = 12) -> qsim.Data:
    batches = torch.randn(many, 1, *shape, WIDTH, generator=torch.Generator().manual_seed(2))
    return qsim.Data("vectors", [{"x": batch} for batch in batches], "0" * 64)


def compare(evaluator: Any, data: qsim.Data, **run: Any) -> tuple[Any, Any]:
    """Evaluate the model, then another model with the first one's outputs as reference."""
    before = evaluator.evaluate(qsim.LoadedModel(Classifier()), data, qsim.Run(**run))
    after = evaluator.evaluate(qsim.LoadedModel(Classifier(1.1)), data, qsim.Run(reference=before.outputs, **run))
    return before, after


@pytest.mark.parametrize("shape", [(), (7,)])
def test_it_is_what_the_formulas_give(shape: tuple[int, ...]) -> None:
    data = inputs(*shape)
    _, found = compare(qsim.parse("fidelity"), data)

    signal = error = cosine = kl = flips = 0.0
    with torch.no_grad():
        rows = [
            (exact.double(), other.double())
            for batch in data.content
            for exact, other in zip(
                Classifier()(**batch).logits.view(-1, CLASSES),
                Classifier(1.1)(**batch).logits.view(-1, CLASSES),
                strict=True,
            )
        ]
    for r, x in rows:
        signal += sum(a * a for a in r.tolist())
        error += sum((a - b) ** 2 for a, b in zip(r.tolist(), x.tolist(), strict=True))
        cosine += float(r @ x / (r.norm() * x.norm())) / len(rows)
        p, q = r.softmax(0), x.softmax(0)
        kl += float((p * (p / q).log()).sum()) / len(rows)
        flips += float(r.argmax() != x.argmax()) / len(rows)
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(signal / error), rel=1e-6)
    assert found["cosine"] == pytest.approx(cosine, rel=1e-9)
    assert found["kl"] == pytest.approx(kl, rel=1e-6)
    assert found["flips"] == pytest.approx(flips, abs=1e-12)
    assert found["vectors"] == len(rows)


def test_a_model_against_itself_has_no_error() -> None:
    before, _ = compare(qsim.parse("fidelity"), inputs())

    assert before["sqnr_db"] == math.inf
    assert before["cosine"] == pytest.approx(1, abs=1e-12)
    assert (before["kl"], before["flips"]) == (0, 0)


def test_equal_logits_are_flips_but_of_the_model_itself_none() -> None:
    model, data = Classifier(), inputs()
    exact = qsim.parse("fidelity").evaluate(qsim.LoadedModel(model), data, qsim.Run()).outputs
    model.weight.data.zero_()

    after = qsim.parse("fidelity").evaluate(qsim.LoadedModel(model), data, qsim.Run(reference=exact))

    assert after["flips"] == 1
    assert qsim.parse("fidelity").evaluate(qsim.LoadedModel(model), data, qsim.Run())["flips"] == 0


def test_few_positions_of_a_long_sequence_are_compared_the_last_one_with_them() -> None:
    data = inputs(9, many=1)

    before, _ = compare(qsim.parse("fidelity(positions=3)"), data)

    with torch.no_grad():
        assert torch.equal(before.outputs[0][0], Classifier()(**data.content[0]).logits[0, [0, 4, 8]])


@pytest.mark.parametrize("output", ["tensor", "tuple", "sample"])
def test_outputs_that_are_no_logits_have_no_divergence(output: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return {"tensor": y, "tuple": (y, None), "sample": SimpleNamespace(sample=y)}[output]

    data = qsim.Data("noise", [torch.randn(1, 2, 5, 5) for _ in range(3)], "")

    assert set(qsim.parse("fidelity").evaluate(qsim.LoadedModel(Net()), data, qsim.Run())) == {
        "sqnr_db",
        "cosine",
        "vectors",
    }


def test_limit_takes_the_first_inputs() -> None:
    assert (
        compare(qsim.parse("fidelity"), inputs(), limit=4)[1] == compare(qsim.parse("fidelity(samples=4)"), inputs())[1]
    )


def test_arguments_from_a_file_of_tensors(tmp_path: Path) -> None:
    x = torch.randn(5, WIDTH)
    save_file({"x": x}, tmp_path / "inputs.safetensors")

    data = qsim.parse("fidelity").read(str(tmp_path / "inputs.safetensors"))

    assert len(data.sha256) == 64
    assert torch.equal(torch.cat([batch["x"] for batch in data.content]), x)
    assert qsim.parse("fidelity").evaluate(qsim.LoadedModel(Classifier()), data, qsim.Run())["vectors"] == 5


def test_tensors_that_are_of_another_model(tmp_path: Path) -> None:
    save_file({"input_ids": torch.zeros(1, WIDTH)}, tmp_path / "inputs.safetensors")
    data = qsim.parse("fidelity").read(str(tmp_path / "inputs.safetensors"))

    with pytest.raises(
        qsim.DataError,
        match=r"^the model, Classifier, cannot run on .*inputs.safetensors: .* unexpected keyword argument 'input_ids'$",
    ):
        qsim.parse("fidelity").example(qsim.LoadedModel(Classifier()), data)


def test_a_file_whose_arguments_differ_in_number(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(5, 2), "y": torch.zeros(4)}, tmp_path / "inputs.safetensors")

    with pytest.raises(
        qsim.DataError, match=r"with the same number of samples along the first axis, not x \(5, 2\), y \(4,\)$"
    ):
        qsim.parse("fidelity").read(str(tmp_path / "inputs.safetensors"))


def test_the_inputs_of_another_evaluator(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("some words")

    assert qsim.parse("fidelity(perplexity)").read(str(tmp_path / "words.txt")).content == "some words"
    with pytest.raises(qsim.DataError, match="name an evaluator, like fidelity\\(perplexity\\)$"):
        qsim.parse("fidelity").read(str(tmp_path / "words.txt"))
    assert str(qsim.parse("fidelity(perplexity(64), samples=8)")) == "fidelity(perplexity(64), samples=8)"


def test_a_model_whose_inputs_nobody_knows() -> None:
    with pytest.raises(
        qsim.DataError, match="^fidelity does not know the inputs of a Classifier; name an evaluator, like"
    ):
        qsim.parse("fidelity").example(qsim.LoadedModel(Classifier()), qsim.Data.of_text("words", "words"))


def test_an_output_without_tensors() -> None:
    model = nn.Module()
    model.forward = lambda x: SimpleNamespace(text="yes")  # type: ignore[method-assign]

    with pytest.raises(
        qsim.DataError, match="^fidelity finds no tensor in a SimpleNamespace; it looks for logits, sample"
    ):
        qsim.parse("fidelity").evaluate(qsim.LoadedModel(model), inputs(), qsim.Run())


class TestFidelity(EvaluatorSuite):
    text = "fidelity"

    def loaded(self) -> qsim.LoadedModel:
        return qsim.LoadedModel(Classifier())

    def data(self, evaluator: Any) -> qsim.Data:
        return inputs(7)
