"""`accuracy(image, text, label)`: share of images or texts that a classifier labels correctly."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.evaluation.metrics import rank
from qsim_core.files import place
from qsim_evaluators.asking import arguments, logits
from qsim_evaluators.fitting import check, longest, require
from qsim_evaluators.labels import Labels
from qsim_evaluators.pixels import encoded, image_rows, pixels, shape_in_words, sides
from qsim_evaluators.text import LONGEST, holds_lines, read_lines, read_rows, tokenized


class Samples(Sequence[dict[str, Tensor]]):
    """A sequence of `many` samples, each made when it is read."""

    def __init__(self, many: int, make: Callable[[int], dict[str, Tensor]]) -> None:
        self.many, self.make = many, make

    def __len__(self) -> int:
        return self.many

    def __getitem__(self, place: Any) -> Any:
        return self.make(range(self.many)[place])


class Accuracy(Evaluator):
    """The share of samples whose label is the model's first answer, and of those whose label is among its first five.

    A class with the same logit as the label ranks before it.

    Data are a mapping with `label` and with `image` or `text`. Labels are whole numbers, or the model's names of its
    classes. `names` in the mapping are the data's names of class 0, class 1, and so on, as a `ClassLabel` has them.
    Where the model names its classes too, a label is the model's class with the same name.

    Images are PIL images or uint8 arrays `[height, width]` or `[height, width, 3]`; the model's own processor resizes
    and normalises them. Texts are cut off after `seqlen` tokens, and padded to the longest of a batch.
    """

    name = "accuracy"
    metric = "accuracy"
    higher_is_better = True
    image: str = Field("image", description="the column with images")
    label: str = Field("label", description="the column with labels")
    text: str = Field("text", description="the column with texts, used if there is no column with images")
    seqlen: PositiveInt | None = Field(None, description="tokens of a text; none: the model's maximum, 512 at most")
    by_name: bool = Field(True, description="match classes by name where both name them; false: by number")

    def read(self, source: str, split: str = "test") -> Data:
        """Read images or texts, and labels, from `datasets`: `NAME[:CONFIG[:SPLIT]]`, or a directory of data files.

        Texts may also come from a file of rows, and images from a directory that has one directory of images for each
        label. The fingerprint is the hash of the labels, the names of their classes, and the texts or encoded images.
        """
        path = place(source)
        if holds_lines(path):
            return self._texts(source, read_lines(path))
        rows = read_rows(source, [self.label], split)
        if self.text in rows.column_names and self.image not in rows.column_names:
            return self._texts(source, rows.select_columns([self.text, self.label]), self._names(rows))
        rows = image_rows(source, [self.image, self.label], split)
        names = self._names(rows)
        digest = hashlib.sha256(repr([*rows[self.label], *names.values()]).encode())
        for image in encoded(rows, self.image):
            digest.update(image)
        return Data(source, {"image": rows[self.image], "label": rows[self.label], **names}, digest.hexdigest())

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Draw samples at random, one in a batch."""
        if length is not None and "text" not in data.content:
            raise DataError("images have no length; leave --calibration-seqlen out")
        many = len(data.content["label"])
        chosen = torch.randint(many, (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
        return [self._inputs(loaded, data, [place], length) for place in chosen]

    def training(self, loaded: LoadedModel, data: Data, length: int | None) -> Sequence[dict[str, Tensor]]:
        """Return the model's inputs and label of each sample, made when it is read. Texts are padded to `length`."""
        kind = "text" if "text" in data.content else "image"
        if length is not None and kind == "image":
            raise DataError("images have no length; leave --seqlen out")
        many = len(data.content["label"])
        labels = self._labels(loaded, data).of(data.content["label"], many, kind)

        def sample(at: int) -> dict[str, Tensor]:
            inputs = self._inputs(loaded, data, [at], length, padded=True)
            return {**{name: value[0] for name, value in inputs.items()}, "labels": labels[at]}

        return Samples(many, sample)

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return the first sample."""
        return self._inputs(loaded, data, [0])

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute `accuracy`, `top5`, `nll` (nats per sample), and the number of `images` or `texts`.

        `majority` is the accuracy of always answering with the most frequent label.
        """
        kind = "text" if "text" in data.content else "image"
        places = list(range(len(data.content["label"])))[: run.limit]
        labels = self._labels(loaded, data).of(data.content["label"], len(places), kind)
        batches = [places[start : start + run.batch_size] for start in range(0, len(places), run.batch_size)]

        def scored(batch: list[int]) -> Tensor:
            outputs = logits(loaded, self._inputs(loaded, data, batch)).float().cpu()
            truth = labels[batch]
            _check_classes(outputs, truth)
            place = rank(outputs, truth)
            nll = F.cross_entropy(outputs, truth, reduction="none")
            return torch.stack([(place == 1).double(), (place <= 5).double(), nll.double()])

        with torch.no_grad():
            top1, top5, nll = run.over(batches, scored, f"{kind}s")
        majority = max(Counter(labels.tolist()).values()) / len(places)
        counts = {"majority": majority, f"{kind}s": float(len(places))}
        return Metrics({"accuracy": top1, "top5": top5, "nll": nll}, counts=counts)

    def protocol_for(self, loaded: LoadedModel, data: Data) -> str:
        """Add to the protocol the way from labels to classes."""
        return f"{self.protocol(loaded)}, {self._labels(loaded, data).described(data.content['label'])}"

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe the number of classes, and the size of images or the length of texts."""
        config: Any = getattr(loaded.model, "config", None)
        if hasattr(config, "image_size"):
            made = f"images made {shape_in_words(sides(config.image_size))} pixels by the model's own processor"
        elif loaded.tokenizer is None:
            made = "images as the model's own processor makes them"
        else:
            made = f"texts cut off after {self._length(loaded)} tokens and padded to the longest of a batch"
        classes = getattr(config, "num_labels", "the model's")
        return f"top-1 accuracy over {classes} classes, {made}"

    def _inputs(
        self, loaded: LoadedModel, data: Data, places: list[int], length: int | None = None, padded: bool = False
    ) -> dict[str, Any]:
        check(self.name, loaded)
        if "text" in data.content:
            require("accuracy of texts", loaded, "tokenizer", "a tokenizer")
            texts = [data.content["text"][place] for place in places]
            return arguments(loaded, tokenized(loaded, texts, length or self._length(loaded), padded))
        require(self.name, loaded, "processor", "an image processor")
        images = pixels(loaded, [data.content["image"][place] for place in places], places[0])
        return arguments(loaded, {"pixel_values": images})

    def _length(self, loaded: LoadedModel) -> int:
        """Return the tokens of a text at most. Some models, such as RoBERTa, have more positions than usable tokens."""
        own = getattr(loaded.tokenizer, "model_max_length", LONGEST)
        return self.seqlen or min(longest(loaded, LONGEST), own, LONGEST)

    def _labels(self, loaded: LoadedModel, data: Data) -> Labels:
        return Labels(loaded, data.content.get("names"), self.by_name)

    def _names(self, rows: Any) -> dict[str, list[str]]:
        """Return `names`, if the column of labels has names of its classes."""
        names = getattr(rows.features[self.label], "names", None)
        return {} if names is None else {"names": list(names)}

    def _texts(self, name: str, rows: Any, names: dict[str, list[str]] | None = None) -> Data:
        """Make data of texts and labels, with the SHA-256 of their JSON. Raises `DataError` for an unsuitable row."""
        texts, labels = [], []
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not isinstance(row.get(self.text), str) or row.get(self.label) is None:
                raise DataError(f"{name}, row {number}: expected a text {self.text!r} and a label {self.label!r}")
            texts.append(row[self.text])
            labels.append(row[self.label])
        if not texts:
            raise DataError(f"{name} has no texts")
        named = names or {}
        digest = hashlib.sha256(json.dumps([texts, labels, *named.values()]).encode()).hexdigest()
        return Data(name, {"text": texts, "label": labels, **named}, digest)


def _check_classes(outputs: Tensor, labels: Tensor) -> None:
    """Raise `DataError` for outputs that are not one number for each class, or for a single class."""
    if outputs.dim() == 2 and outputs.shape[1] == 1:
        raise DataError("the model has one output and no classes; use the evaluator fidelity")
    if outputs.dim() != 2 or int(labels.max()) >= outputs.shape[1]:
        raise DataError(
            f"the data have a label {int(labels.max())}, and the model's outputs are {tuple(outputs.shape)}, not one "
            f"number for each class of each sample"
        )
