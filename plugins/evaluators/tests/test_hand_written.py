"""Models without a configuration, whose forward returns a tensor and names its argument as it likes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import qsim_core as qsim

TEXT = "a hand-written model reads one letter and guesses the next one. " * 8


class Letters:
    """A tokenizer of letters without padding."""

    pad_token_id = 0
    mask_token_id = 1

    def __call__(self, text: Any, **options: Any) -> Any:
        if isinstance(text, str):
            return SimpleNamespace(input_ids=[ord(letter) for letter in text])
        longest = max(map(len, text))
        ids = torch.tensor([[ord(letter) for letter in one] + [0] * (longest - len(one)) for one in text])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Model(nn.Module):
    """Logits of the next letter, or of the class of a whole text."""

    def __init__(self, outputs: int, whole: bool) -> None:
        super().__init__()
        self.table, self.head, self.whole = nn.Embedding(128, 16), nn.Linear(16, outputs), whole

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.table(tokens)
        return self.head(states.mean(1) if self.whole else states)  # type: ignore[no-any-return]


class Positioned(Model):
    """A model that has 32 positions."""

    def __init__(self) -> None:
        super().__init__(128, False)
        self.places = nn.Embedding(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens) + self.places(torch.arange(tokens.shape[1])))  # type: ignore[no-any-return]


class Pixels(nn.Module):
    """Logits of four classes of small grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def to_unit(images: list[Any], return_tensors: str) -> dict[str, Tensor]:
    return {"pixel_values": torch.tensor(np.stack([np.asarray(image)[None] for image in images])) / 255}


class ByHand(qsim.Adapter):
    """An adapter of the models above."""

    name = "by_hand"

    def load(self, model: str, dtype: torch.dtype) -> qsim.LoadedModel:
        kind = Path(model).name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if kind == "images":
                return qsim.LoadedModel(Pixels().eval(), None, to_unit)
            made = {"language": lambda: Model(128, False), "classes": lambda: Model(3, True), "places": Positioned}
            return qsim.LoadedModel(made[kind]().eval(), Letters())


def evaluated(directory: Path, kind: str, evaluator: str, data: Path, **run: Any) -> qsim.Result:
    folder = directory / kind
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "by_hand", "architectures": ["Model"]}')
    host = qsim.Host()
    host.register(ByHand)
    recipe = {"model": str(folder), "weights": "int8", "activations": "int8", "evaluate": evaluator}
    return qsim.evaluate(recipe, host=host, data=str(data), run=qsim.Run(**run))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text, "label": n % 3}) for n, text in enumerate(TEXT.split()[:10])]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def test_perplexity_is_what_torch_computes(tmp_path: Path, text: Path) -> None:
    result = evaluated(tmp_path, "language", "perplexity(32)", text)

    model = ByHand().load("language", torch.float32).model
    windows = torch.tensor([ord(letter) for letter in TEXT]).unfold(0, 32, 32)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert result.baseline["nll"] == pytest.approx(losses.item(), rel=1e-6)
    assert result.audit.covered == 1


def test_masked_lm_is_what_torch_computes(tmp_path: Path, text: Path) -> None:
    loaded, masked = ByHand().load("language", torch.float32), qsim.parse("masked_lm(32, share=0.5)")
    data = masked.read(str(text))
    seen = masked.example(loaded, data)["tokens"]
    letters = torch.tensor([ord(letter) for letter in TEXT[:32]])
    with torch.no_grad():
        losses = nn.functional.cross_entropy(loaded.model(seen)[seen == 1], letters[seen[0] == 1])

    found = masked.evaluate(loaded, data, qsim.Run(limit=1))

    assert (found["tokens"], found["nll"]) == (16, pytest.approx(losses.item(), rel=1e-6))


def test_accuracy_of_texts_is_what_torch_computes(tmp_path: Path, rows: Path) -> None:
    result = evaluated(tmp_path, "classes", "accuracy", rows, batch_size=1)

    model = ByHand().load("classes", torch.float32).model
    with torch.no_grad():
        found = [int(model(torch.tensor([[ord(letter) for letter in t]])).argmax()) for t in TEXT.split()[:10]]
    assert result.baseline["accuracy"] == sum(answer == n % 3 for n, answer in enumerate(found)) / 10
    assert result.protocol.startswith("top-1 accuracy over the model's classes, texts cut off after 512 tokens")


def test_accuracy_of_images_is_what_torch_computes(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4), dtype=np.uint8)
    for number, image in enumerate(images):
        (tmp_path / "test" / str(number % 4)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "test" / str(number % 4) / f"{number}.png")

    result = evaluated(tmp_path, "images", "accuracy", tmp_path)

    with torch.no_grad():
        answers = ByHand().load("images", torch.float32).model(torch.tensor(images) / 255).argmax(1)
    assert result.baseline["accuracy"] == (answers == torch.arange(8) % 4).double().mean()


def test_fidelity_compares_its_outputs(tmp_path: Path, text: Path) -> None:
    result = evaluated(tmp_path, "language", "fidelity(perplexity(32), samples=8)", text)

    assert 20 < result.simulated["sqnr_db"] < 70


@pytest.mark.parametrize(
    ("kind", "evaluator", "message"),
    [
        ("language", "fidelity", "fidelity reads tensors from a .safetensors file; to read {} name an evaluator, like fidelity(perplexity)"),
        ("places", "perplexity(64)", "the model, Positioned, cannot run on the example of perplexity(64): index out of range in self"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(tmp_path: Path, text: Path, kind: str, evaluator: str, message: str) -> None:
    with pytest.raises(qsim.DataError) as error:
        evaluated(tmp_path, kind, evaluator, text)

    assert str(error.value) == message.format(text)


def test_a_batch_with_padding_needs_a_mask(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(
        qsim.DataError, match=r"^the model, Model, takes no attention_mask for padded texts; give --batch"
    ):
        evaluated(tmp_path, "classes", "accuracy", rows, batch_size=4)


def test_more_labels_than_outputs(tmp_path: Path, rows: Path) -> None:
    rows.write_text('{"text": "a", "label": 5}')

    with pytest.raises(
        qsim.DataError, match=r"^the data have a label 5, and the model's outputs are \(1, 3\), not one"
    ):
        evaluated(tmp_path, "classes", "accuracy", rows)


def test_one_output_is_no_class(tmp_path: Path) -> None:
    loaded = qsim.LoadedModel(Model(1, True).eval(), Letters())
    texts = qsim.Data("texts", {"text": ["a", "b"], "label": [0, 0]}, "0")

    with pytest.raises(qsim.DataError, match="^the model has one output and no classes; use the evaluator fidelity$"):
        qsim.parse("accuracy").evaluate(loaded, texts, qsim.Run(batch_size=1))
