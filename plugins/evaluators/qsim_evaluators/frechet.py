"""`frechet(features, steps, samples)`: distance between a diffusion model's images and reference images, as sets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from qsim_core import Data, DataError, LoadedModel, Metrics, Run
from qsim_core.components.host import installed
from qsim_core.evaluation.locate import named_model
from qsim_core.files import place
from qsim_evaluators import ddim
from qsim_evaluators.features import Features, describe, features
from qsim_evaluators.fitting import device
from qsim_evaluators.pictures import as_bytes, write_side_by_side
from qsim_evaluators.pixels import encoded, image_files, image_rows
from qsim_evaluators.prompts import FromTexts, makes_images_of_texts

GROUPS = 20
"""Number of groups of images in the jackknife that estimates the uncertainty of the distance."""


@dataclass(frozen=True)
class Made:
    """The outputs of one run: its images, and the features of the reference images, which the next run reuses."""

    images: Tensor
    """uint8 `[images, channels, height, width]`."""
    reference_features: Tensor
    """`[reference images, width]`."""


class Frechet(ddim.FromNoise):
    """The Fréchet distance between images that the model makes and reference images (arXiv 1706.08500).

    A given model computes features of both sets. Each set is described by the Gaussian with the mean and covariance of
    its features. With Inception's features the distance is FID. The images are made by DDIM's path, as in `denoising`,
    from noise drawn by the run's seed. The noise is the same for the unquantized and the simulated model. A pipeline
    that takes prompts makes one image of each text instead, with its own scheduler.

    Data are a mapping with `image`: PIL images or uint8 arrays `[height, width]` or `[height, width, 3]`. The data of a
    classifier fit too; its labels are ignored. For a pipeline that takes prompts, data also have `text`.
    """

    name = "frechet"
    metric = "frechet_distance"
    features: str = Field(
        description="the model that computes features: a name of the zoo or the hub, a directory, a .pt2 file"
    )
    steps: PositiveInt = Field(25, description="steps from noise to image")
    samples: PositiveInt = Field(256, description="images that are made")
    image: str = Field("image", description="the column with reference images")
    text: str = Field("text", description="the column with prompts, for a pipeline that makes images from texts")
    guidance: float | None = Field(
        None, description="a pipeline's scale of classifier-free guidance; none: the pipeline's own"
    )

    def read(self, source: str, split: str = "test") -> Data:
        """Read reference images from the files in a directory, or from a column of `NAME[:CONFIG[:SPLIT]]`.

        Prompts are read from the same source, if it has any.
        """
        path = place(source)
        rows, column = image_files(path) if path.is_dir() else None, "image"
        if rows is None:
            rows, column = image_rows(source, [self.image], split), self.image
        digest = hashlib.sha256()
        for image in encoded(rows, column):
            digest.update(image)
        content = {"image": rows[column]}
        if self.text in rows.column_names:
            content["text"] = [str(text) for text in rows[self.text]]
            digest.update("\n".join(content["text"]).encode())
        return Data(source, content, digest.hexdigest())

    def default_data(self) -> Data | None:
        """Return the evaluation data of the model that computes features, if the model has any."""
        named = named_model(self.features, installed())
        return None if named is None else named[2].data()

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute `frechet_distance`, NaN if an image is not finite, and count `images` and `reference_images`."""
        of_images, (many, batches) = features(self.features, device(loaded)), self._made(loaded, data, run)
        reference = _reference(of_images, data, run) if run.reference is None else run.reference.reference_features
        for what, count in (("made", many), ("reference", len(reference))):
            if count <= reference.shape[1]:
                raise DataError(
                    f"{count} {what} images are too few for the covariance of {reference.shape[1]} features: it needs "
                    f"more images than features"
                )
        images, found, finite = [], [], True
        for made in batches:
            finite = finite and bool(made.isfinite().all())
            images.append(as_bytes(made))
            found.append(of_images(_pictures(images[-1])))
        shares = contributions(reference, torch.cat(found)) if finite else torch.full((min(GROUPS, many),), math.nan)
        counts = {"images": float(many), "reference_images": float(len(reference))}
        return Metrics({self.metric: shares}, counts=counts, outputs=Made(torch.cat(images), reference))

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Draw inputs from a denoiser's own paths, or prompts with their noise."""
        if not makes_images_of_texts(loaded):
            return super().calibration(loaded, data, samples, length, seed)
        return list(self._of_texts().calibration(loaded, _prompts(data), samples, length, seed))

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return one image's noise at the first step, or the first prompt with few steps."""
        if not makes_images_of_texts(loaded):
            return super().example(loaded, data)
        return self._of_texts().example(loaded, _prompts(data))

    def _made(self, loaded: LoadedModel, data: Data, run: Run) -> tuple[int, Iterator[Tensor]]:
        """Return the number of images, and an iterator over batches of them with pixels from -1 to 1."""
        most = min(self.samples, run.limit or self.samples)
        if makes_images_of_texts(loaded):
            prompts = _prompts(data)[:most]
            return len(prompts), self._of_texts().images(loaded, prompts, run)
        return most, ddim.images(loaded, ddim.noise(loaded, most, run.seed), self.scheduler(loaded), run)

    def _of_texts(self) -> FromTexts:
        return FromTexts(self.name, self.steps, self.guidance)

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe the images, the features and the interval in words."""
        made = f"after {self.steps} steps of DDIM from one noise"
        if makes_images_of_texts(loaded):
            guidance = "the pipeline's own guidance" if self.guidance is None else f"guidance {self.guidance:g}"
            made = f"one for each prompt, {self.steps} steps, {guidance}"
        return (
            f"Fréchet distance of {self.samples} images at most, {made}, to "
            f"the reference images; features: {describe(self.features)}; it shrinks with more images; its interval is "
            f"that of as many images, by a jackknife with {GROUPS} groups, against these references"
        )

    def save_samples(self, baseline: Made, simulated: Made, directory: Path) -> None:
        """Write `samples.png`: the baseline's images on the left, those of the simulated model on the right."""
        write_side_by_side(baseline.images, simulated.images, directory / "samples.png")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), equation 6 of arXiv 1706.08500, in float64.

    The means and the covariances (with n - 1) are those of the rows of `a` and of `b`, `[images, width]`. The result is
    NaN if an element is not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    identity: Any = nn.Identity()  # in place of torchmetrics' Inception, because `a` and `b` are features
    identity.num_features = a.shape[1]
    distance = FrechetInceptionDistance(feature=identity)
    distance.update(a.double(), real=True)
    distance.update(b.double(), real=False)
    return float(distance.compute())


def contributions(reference: Tensor, made: Tensor) -> Tensor:
    """Compute the contributions [groups] of groups of rows of `made` to the distance, which is their mean.

    The contributions are the pseudo-values of the delete-a-group jackknife, shifted so that their mean is the distance
    D. That of group g is D + (G - 1) (mean of D₋ - D₋ᵍ), where D₋ᵍ is the distance without group g. There are `GROUPS`
    groups, or one for each row if there are fewer rows.

    The contributions have the interval of any mean of samples. Source: Efron and Tibshirani, *An Introduction to the
    Bootstrap*, 1993, §11.5.
    """
    many = min(GROUPS, len(made))
    groups = torch.arange(len(made)) % many
    left = [frechet_distance(reference, made[groups != group]) for group in range(many)]
    without = torch.tensor(left, dtype=torch.float64)
    return frechet_distance(reference, made) + (many - 1) * (without.mean() - without)


def _reference(of_images: Features, data: Data, run: Run) -> Tensor:
    """Compute the features of the reference images. Raises `DataError` if there are none, or one cannot be read."""
    if not isinstance(data.content, Mapping) or "image" not in data.content:
        raise DataError(f"frechet needs reference images, and {data.name} has none; name some with --data")
    images = data.content["image"]
    batches = torch.arange(len(images)).split(run.batch_size)
    try:
        found = [
            of_images([images[place] for place in batch.tolist()])
            for batch in run.track(batches, len(batches), "reference")
        ]
    except OSError as error:
        raise DataError(f"a reference image of {data.name} cannot be read: {error}") from None
    return torch.cat(found)


def _prompts(data: Data) -> list[str]:
    """Return the prompts. Raises `DataError` if there are none."""
    if not isinstance(data.content, Mapping) or not data.content.get("text"):
        raise DataError(
            f"frechet needs a prompt for each image of this pipeline, and {data.name} has no column of texts"
        )
    return list(data.content["text"])


def _pictures(images: Tensor) -> list[Any]:
    """Split uint8 `[images, channels, height, width]` into arrays `[height, width]` or `[height, width, 3]`."""
    if images.shape[1] not in (1, 3):
        raise DataError(f"the model makes images of {images.shape[1]} channels, which are neither grey nor RGB")
    return list(images.permute(0, 2, 3, 1).squeeze(3).numpy())
