"""`accuracy(image, label)`: how often an image classifier is right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_evaluators.fitting import check
from qsim_evaluators.pixels import by, encoded, image_rows, pixels, sides


class Samples(Sequence[dict[str, Tensor]]):
    """So many samples, each made when it is asked for."""

    def __init__(self, many: int, make: Callable[[int], dict[str, Tensor]]) -> None:
        self.many, self.make = many, make

    def __len__(self) -> int:
        return self.many

    def __getitem__(self, place: Any) -> Any:
        return self.make(range(self.many)[place])


class Accuracy(Evaluator):
    """The share of images whose label is the likeliest, and among the five likeliest.

    The model's own processor resizes and normalises. Data are a mapping with `image`, PIL images or uint8 arrays
    `[height, width]` or `[height, width, 3]`, and `label`, whole numbers or the names that the model gives its classes.
    """

    name = "accuracy"
    metric = "accuracy"
    higher_is_better = True
    image: str = Field("image", description="the column with images")
    label: str = Field("label", description="the column with labels")

    def read(self, source: str, split: str = "test") -> Data:
        """Images and labels from `datasets`: `NAME[:CONFIG[:SPLIT]]`, or a directory with one of images for each label.

        The fingerprint is of the encoded images and the labels.
        """
        rows = image_rows(source, [self.image, self.label], split)
        digest = hashlib.sha256(repr(list(rows[self.label])).encode())
        for image in encoded(rows, self.image):
            digest.update(image)
        return Data(source, {"image": rows[self.image], "label": rows[self.label]}, digest.hexdigest())

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Images drawn at random, one in a batch."""
        if length is not None:
            raise DataError("images have no length; leave --calibration-seqlen out")
        many = len(data.content["image"])
        chosen = torch.randint(many, (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
        return [{"pixel_values": self._pixels(loaded, data, [place])} for place in chosen]

    def training(self, loaded: LoadedModel, data: Data, length: int | None) -> Sequence[dict[str, Tensor]]:
        """The images as the processor makes them, when they are asked for, with their labels."""
        if length is not None:
            raise DataError("images have no length; leave --seqlen out")
        many = len(data.content["image"])
        labels = _labels(loaded, data.content["label"], many)
        return Samples(many, lambda at: {"pixel_values": self._pixels(loaded, data, [at])[0], "labels": labels[at]})

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """The first image."""
        return {"pixel_values": self._pixels(loaded, data, [0])}

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """`accuracy`, `top5`, `nll` (nats per image), and the number of `images`."""
        places = list(range(len(data.content["image"])))[: run.limit]
        labels = _labels(loaded, data.content["label"], len(places))
        batches = [places[start : start + run.batch_size] for start in range(0, len(places), run.batch_size)]
        found = []
        with torch.no_grad():
            for batch in run.track(batches, len(batches), "images"):
                logits = loaded.model(pixel_values=self._pixels(loaded, data, batch)).logits.float().cpu()
                truth = labels[batch]
                right = logits.topk(min(5, logits.shape[1])).indices == truth.unsqueeze(1)
                nll = F.cross_entropy(logits, truth, reduction="none")
                found.append(torch.stack([right[:, 0].double(), right.any(1).double(), nll.double()]))
        top1, top5, nll = torch.cat(found, 1)
        return Metrics({"accuracy": top1, "top5": top5, "nll": nll}, counts={"images": float(len(places))})

    def protocol(self, loaded: LoadedModel) -> str:
        """What the processor makes of an image, in words."""
        config: Any = loaded.model.config
        made = f"{by(sides(config.image_size))} pixels by the model's own processor"
        return f"top-1 accuracy over {config.num_labels} classes, images made {made}"

    def _pixels(self, loaded: LoadedModel, data: Data, places: list[int]) -> Tensor:
        check(self.name, loaded)
        return pixels(loaded, [data.content["image"][place] for place in places], places[0])


def _labels(loaded: LoadedModel, labels: Sequence[Any], many: int) -> Tensor:
    """The first labels as class numbers. Raises `DataError` for one that the model has no class for."""
    config: Any = loaded.model.config
    found = []
    for place in range(many):
        label = config.label2id.get(labels[place], -1) if isinstance(labels[place], str) else int(labels[place])
        if not 0 <= label < config.num_labels:
            raise DataError(
                f"label {labels[place]!r} of image {place} is none of the model's {config.num_labels} classes, "
                f"0 to {config.num_labels - 1}"
            )
        found.append(label)
    return torch.tensor(found)
