"""`frechet(features, steps, samples)`: how far a diffusion model's images, as a whole, are from given ones."""

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
from qsim_core.evaluation.locate import named_models
from qsim_evaluators import ddim
from qsim_evaluators.features import Features, described, features
from qsim_evaluators.fitting import device
from qsim_evaluators.pictures import as_bytes, beside
from qsim_evaluators.pixels import encoded, image_files, image_rows
from qsim_evaluators.prompts import FromTexts, makes_images_of_texts

GROUPS = 20
"""Into so many the images are divided, to see how sure their distance is."""


@dataclass(frozen=True)
class Made:
    """What one run leaves: its images, and the features of the reference images, which are the next run's too."""

    images: Tensor
    """uint8 `[images, channels, height, width]`."""
    reference_features: Tensor
    """`[reference images, width]`."""


class Frechet(ddim.FromNoise):
    """The Fréchet distance between images that the model makes and reference images (arXiv 1706.08500).

    Both sets become features of a given model, and of each set the Gaussian of the same mean and covariance is taken;
    with Inception's features it is FID. The images come down DDIM's path, as `denoising`'s do, from noise that the
    run's seed draws: the same for the model as it is and for the simulated one. A pipeline that takes prompts makes one
    image of each text instead, by its own scheduler. Data are a mapping with `image`, PIL images or uint8 arrays
    `[height, width]` or `[height, width, 3]`; a classifier's will do, without their labels; and, for such a pipeline,
    `text`.
    """

    name = "frechet"
    metric = "frechet_distance"
    features: str = Field(
        description="the model whose features are compared: the zoo's, a directory, the hub's; a .pt2"
    )
    steps: PositiveInt = Field(25, description="of the path from noise to image")
    samples: PositiveInt = Field(256, description="images that are made")
    image: str = Field("image", description="the column with reference images")
    text: str = Field("text", description="the column with prompts, for a pipeline that makes images of texts")
    guidance: float | None = Field(
        None, description="a pipeline's scale of classifier-free guidance; none: the pipeline's own"
    )

    def read(self, source: str, split: str = "test") -> Data:
        """Reference images: the files in a directory, or a column of `datasets`, `NAME[:CONFIG[:SPLIT]]`; and the
        prompts beside them, if there are any."""
        path = Path(source).expanduser()
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
        """The images that the model of features is evaluated on itself, if it comes with any."""
        named = named_models(installed())
        return named[self.features][1].data() if self.features in named else None

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """`frechet_distance`, NaN if an image is not finite; the number of `images` and of `reference_images`."""
        of_images, (many, batches) = features(self.features, device(loaded)), self._made(loaded, data, run)
        reference = _reference(of_images, data, run) if run.reference is None else run.reference.reference_features
        for what, count in (("made", many), ("reference", len(reference))):
            if count <= reference.shape[1]:
                raise DataError(
                    f"{count} {what} images are too few for the covariance of {reference.shape[1]} features: it takes "
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
        """Places on a denoiser's own paths, or prompts with their noise."""
        if not makes_images_of_texts(loaded):
            return super().calibration(loaded, data, samples, length, seed)
        return list(self._of_texts().calibration(loaded, _prompts(data), samples, length, seed))

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """One image's noise at the first step, or the first prompt with few steps."""
        if not makes_images_of_texts(loaded):
            return super().example(loaded, data)
        return self._of_texts().example(loaded, _prompts(data))

    def _made(self, loaded: LoadedModel, data: Data, run: Run) -> tuple[int, Iterator[Tensor]]:
        """How many images will be made, and they themselves, in batches, from -1 to 1."""
        most = min(self.samples, run.limit or self.samples)
        if makes_images_of_texts(loaded):
            prompts = _prompts(data)[:most]
            return len(prompts), self._of_texts().images(loaded, prompts, run)
        return most, ddim.images(loaded, ddim.noise(loaded, most, run.seed), self.scheduler(loaded), run)

    def _of_texts(self) -> FromTexts:
        return FromTexts(self.name, self.steps, self.guidance)

    def protocol(self, loaded: LoadedModel) -> str:
        """Which images, which features, and what the interval is of."""
        made = f"after {self.steps} steps of DDIM from one noise"
        if makes_images_of_texts(loaded):
            guidance = "the pipeline's own guidance" if self.guidance is None else f"guidance {self.guidance:g}"
            made = f"one for each prompt, {self.steps} steps, {guidance}"
        return (
            f"Fréchet distance of {self.samples} images at most, {made}, to "
            f"the reference images; features: {described(self.features)}; it shrinks with more images; its interval is "
            f"that of as many images, by a jackknife with {GROUPS} groups, against these references"
        )

    def save_samples(self, baseline: Made, simulated: Made, directory: Path) -> None:
        """`samples.png`: the baseline's images on the left, the simulated model's on the right, in the same order."""
        beside(baseline.images, simulated.images, directory / "samples.png")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), equation 6 of arXiv 1706.08500, in float64.

    The means and the covariances (of n - 1) are those of the rows of `a` and of `b`, `[images, width]`; NaN if one of
    them is not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    as_they_are: Any = nn.Identity()  # where torchmetrics has Inception: the features are made already
    as_they_are.num_features = a.shape[1]
    distance = FrechetInceptionDistance(feature=as_they_are)
    distance.update(a.double(), real=True)
    distance.update(b.double(), real=False)
    return float(distance.compute())


def contributions(reference: Tensor, made: Tensor) -> Tensor:
    """What each of `GROUPS` groups of the rows of `made` contributes to their distance, which is the mean: [groups].

    Pseudo-values of the delete-a-group jackknife, around the distance: D + (G - 1) (mean of D₋ - D₋ᵍ), D₋ᵍ being the
    distance without group g; as many groups as rows where these are fewer. Samples drawn again would repeat images,
    which alone makes the distance larger; the contributions can be drawn again as those of any mean. Efron and
    Tibshirani, *An Introduction to the Bootstrap*, 1993, §11.5.
    """
    many = min(GROUPS, len(made))
    groups = torch.arange(len(made)) % many
    left = [frechet_distance(reference, made[groups != group]) for group in range(many)]
    without = torch.tensor(left, dtype=torch.float64)
    return frechet_distance(reference, made) + (many - 1) * (without.mean() - without)


def _reference(of_images: Features, data: Data, run: Run) -> Tensor:
    """The features of the reference images. Raises `DataError` if there are none, or one cannot be read."""
    if not isinstance(data.content, Mapping) or "image" not in data.content:
        raise DataError(f"frechet needs reference images, and {data.name} is none; name some with --data")
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
    """Raises `DataError` if there are none."""
    if not isinstance(data.content, Mapping) or not data.content.get("text"):
        raise DataError(
            f"frechet needs a prompt for each image of this pipeline, and {data.name} has no column of texts"
        )
    return list(data.content["text"])


def _pictures(images: Tensor) -> list[Any]:
    """uint8 `[images, channels, height, width]` as arrays `[height, width]` or `[height, width, 3]`."""
    if images.shape[1] not in (1, 3):
        raise DataError(f"the model makes images of {images.shape[1]} channels, which are neither grey nor RGB")
    return list(images.permute(0, 2, 3, 1).squeeze(3).numpy())
