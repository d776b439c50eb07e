"""`accuracy(image, label)`: how often an image classifier is right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_evaluators.fitting import check, device, dtype
from qsim_evaluators.text import read_rows


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
        import datasets

        rows = read_rows(source, [self.image, self.label], split)
        if not isinstance(rows.features[self.image], datasets.Image):
            raise DataError(f"column {self.image!r} of {source!r} holds {rows.features[self.image]}, no images")
        digest = hashlib.sha256(repr(list(rows[self.label])).encode())
        for row in rows.select_columns(self.image).cast_column(self.image, datasets.Image(decode=False)):
            digest.update(row[self.image]["bytes"] or _content(row[self.image]["path"]))
        return Data(source, {"image": rows[self.image], "label": rows[self.label]}, digest.hexdigest())

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Images drawn at random, one in a batch."""
        if length is not None:
            raise DataError("images have no length; leave --calibration-seqlen out")
        many = len(data.content["image"])
        chosen = torch.randint(many, (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
        return [{"pixel_values": self._pixels(loaded, data, [place])} for place in chosen]

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
        made = f"{_by(_sides(config.image_size))} pixels by the model's own processor"
        return f"top-1 accuracy over {config.num_labels} classes, images made {made}"

    def _pixels(self, loaded: LoadedModel, data: Data, places: list[int]) -> Tensor:
        """What the model takes, `[images, channels, height, width]`. Raises `DataError` for images that it cannot."""
        check(self.name, loaded)
        config: Any = loaded.model.config
        channels = config.num_channels
        images = [_image(data.content["image"][place], place, channels) for place in places]
        pixels: Tensor = loaded.processor(images, return_tensors="pt")["pixel_values"]
        expected = (channels, *_sides(config.image_size))
        if tuple(pixels.shape[1:]) != expected:
            raise DataError(
                f"image {places[0]} becomes {_by(pixels.shape[1:])}, the model takes {_by(expected)} "
                f"(channels, height, width): its processor does not fit it"
            )
        return pixels.to(device(loaded), dtype(loaded))


def _image(image: Any, place: int, channels: int) -> Any:
    """A PIL image of as many channels as the model takes: grey becomes RGB, RGB is never made grey unasked."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = image.numpy() if isinstance(image, Tensor) else image
        if str(array.dtype) != "uint8" or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
            raise DataError(
                f"image {place} is {array.dtype} of shape {tuple(array.shape)}; "
                f"expected uint8, [height, width] or [height, width, 3]"
            )
        image = Image.fromarray(array)
    if channels == 1 and image.mode not in ("1", "L"):
        raise DataError(f"image {place} has mode {image.mode}, the model takes one channel; convert the images to 'L'")
    return image.convert("L" if channels == 1 else "RGB")


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


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _sides(size: Any) -> tuple[int, int]:
    """Height and width, of which a configuration may name one for both."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


def _by(shape: Any) -> str:
    return " by ".join(map(str, shape))
