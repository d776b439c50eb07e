"""`denoising(steps, samples)`: distance of the simulated diffusion model's images from those of the unquantized one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core import Data, LoadedModel, Metrics, Run
from qsim_core.evaluation.metrics import Means
from qsim_evaluators import ddim
from qsim_evaluators.pictures import write_side_by_side

MARKS = (25, 50, 75)
"""Percentages of the steps after which the error is also measured."""


class Denoising(ddim.FromNoise):
    """The distance between the images of the simulated model and those of the unquantized model from the same noise.

    Both follow DDIM's deterministic path (arXiv 2010.02502, η = 0) of `steps` steps under the model's own noise
    schedule. `error` is |x - x*| / |x*| at the end, over all images and pixels. `error_at_50` is the same half-way. The
    error of the unquantized model is zero. The run's seed draws the noise.
    """

    name = "denoising"
    metric = "error"
    steps: PositiveInt = Field(25, description="steps from noise to image")
    samples: PositiveInt = Field(32, description="images that are made")

    def default_data(self) -> Data:
        """Return a name for the noise, which needs no file."""
        return Data("Gaussian noise", None, hashlib.sha256(b"Gaussian noise").hexdigest())

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """Compute `error` at the end, the errors at a quarter, half and three quarters, and the number of `images`."""
        scheduler = self.scheduler(loaded)
        noise = ddim.noise(loaded, min(self.samples, run.limit or self.samples), run.seed)
        path = ddim.paths(loaded, noise, scheduler, run)
        exact = path if run.reference is None else run.reference
        places = {f"error_at_{mark}": self.steps * mark // 100 for mark in MARKS} | {"error": self.steps}
        samples = {}
        for name, place in places.items():
            samples[f"{name} off"] = (path[place] - exact[place]).flatten(1).double().square().sum(1)
            samples[f"{name} size"] = exact[place].flatten(1).double().square().sum(1)

        def metrics(means: Means) -> Means:
            return {name: (means[f"{name} off"] / means[f"{name} size"]).sqrt() for name in places}

        return Metrics(samples, metrics, counts={"images": float(len(noise))}, outputs=path)

    def protocol(self, loaded: LoadedModel) -> str:
        """Describe the path in words."""
        return f"relative error of images after {self.steps} steps of DDIM from one noise, against the model as it is"

    def save_samples(self, baseline: Tensor, simulated: Tensor, directory: Path) -> None:
        """Write `samples.png`: the baseline's images on the left, those of the simulated model on the right."""
        write_side_by_side(baseline[-1], simulated[-1], directory / "samples.png")
