"""`denoising(steps, samples)`: how far a diffusion model strays from its own path."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Metrics, Run
from qsim_core.metrics import Means
from qsim_evaluators.fitting import check, device, dtype
from qsim_evaluators.pictures import beside

MARKS = (25, 50, 75)
"""Percent of the way, where the error is measured besides the end."""


class Denoising(Evaluator):
    """The distance between what the simulated model makes of noise and what the model as it is makes of the same noise.

    Both walk down DDIM's deterministic path (arXiv 2010.02502, η = 0) of `steps` steps under the model's own schedule
    of noise. `error` is |x - x*| / |x*| at the end, over all images and pixels; `error_at_50` the same half-way. The
    model's own error is zero. The noise is drawn by the run's seed.
    """

    name = "denoising"
    metric = "error"
    steps: PositiveInt = Field(25, description="of the path from noise to image")
    samples: PositiveInt = Field(32, description="images that are made")

    def default_data(self) -> Data:
        """Noise, which needs no file."""
        return Data("Gaussian noise", None, hashlib.sha256(b"Gaussian noise").hexdigest())

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Places on the model's own paths, each at a step of its own, as Q-Diffusion draws them (arXiv 2302.04304)."""
        if length is not None:
            raise DataError("images have no length; leave --calibration-seqlen out")
        path, times = self._path(loaded, self._noise(loaded, samples, seed), Run())
        drawn = torch.randint(len(times), (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
        return [self._batch(loaded, path[step, i : i + 1], times[step]) for i, step in enumerate(drawn)]

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """One image's noise at the first step."""
        return self._batch(loaded, self._noise(loaded, 1, 0), self._scheduler(loaded).timesteps.tolist()[0])

    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> Metrics:
        """`error` at the end, at a quarter, half and three quarters of the way, and the number of `images`."""
        noise = self._noise(loaded, min(self.samples, run.limit or self.samples), run.seed)
        path, _ = self._path(loaded, noise, run)
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
        """The path in words."""
        return f"relative error of images after {self.steps} steps of DDIM from one noise, against the model as it is"

    def save_samples(self, baseline: Tensor, simulated: Tensor, directory: Path) -> None:
        """`samples.png`: the baseline's images on the left, the simulated model's on the right, in the same order."""
        beside(baseline[-1], simulated[-1], directory / "samples.png")

    def _noise(self, loaded: LoadedModel, many: int, seed: int) -> Tensor:
        """`[many, channels, height, width]`; an image's noise does not depend on how many there are."""
        check(self.name, loaded)
        config: Any = loaded.model.config
        sides = config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size] * 2
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([torch.randn(config.in_channels, *sides, generator=generator) for _ in range(many)])

    def _path(self, loaded: LoadedModel, noise: Tensor, run: Run) -> tuple[Tensor, list[int]]:
        """`[steps + 1, images, …]`: the images from noise to end, and the time of each step."""
        scheduler = self._scheduler(loaded)
        times: list[int] = scheduler.timesteps.tolist()
        batches, paths = noise.split(run.batch_size), []
        with torch.no_grad():
            for images in run.track(batches, len(batches), "images"):
                path = [images]
                for time in times:
                    predicted = loaded.model(**self._batch(loaded, path[-1], time)).sample.float().cpu()
                    path.append(scheduler.step(predicted, time, path[-1]).prev_sample)
                paths.append(torch.stack(path))
        return torch.cat(paths, 1), times

    def _scheduler(self, loaded: LoadedModel) -> Any:
        """DDIM under the noise that the model was trained with."""
        import diffusers

        check(self.name, loaded)
        ddim: Any = diffusers.DDIMScheduler
        scheduler = ddim.from_config(loaded.processor.config)
        trained = scheduler.config.num_train_timesteps
        if self.steps > trained:
            raise DataError(f"the model knows {trained} steps of noise, fewer than steps={self.steps}")
        scheduler.set_timesteps(self.steps)
        return scheduler

    @staticmethod
    def _batch(loaded: LoadedModel, images: Tensor, time: int) -> dict[str, Any]:
        return {
            "sample": images.to(device(loaded), dtype(loaded)),
            "timestep": torch.full((len(images),), time, device=device(loaded)),
        }
