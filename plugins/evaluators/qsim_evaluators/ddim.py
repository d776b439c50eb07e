"""Make images from noise by DDIM's deterministic path (arXiv 2010.02502, η = 0), for models with a scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Run
from qsim_evaluators.fitting import check, device, dtype


class FromNoise(Evaluator):
    """An evaluator that makes images from noise. It takes calibration batches and the example from the path."""

    steps: PositiveInt

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Draw inputs from the model's own paths, each at a random step. Data are not used."""
        if length is not None:
            raise DataError("images have no length; leave --calibration-seqlen out")
        return draw_inputs(loaded, self.scheduler(loaded), samples, seed)

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """Return one image's noise at the first step."""
        first, *_ = self.scheduler(loaded).timesteps.tolist()
        return arguments(loaded, noise(loaded, 1, 0), first)

    def scheduler(self, loaded: LoadedModel) -> Any:
        """Make DDIM's scheduler for `steps` steps. Raises `DataError` if the model does not make images from noise."""
        check(self.name, loaded)
        return schedule(loaded, self.steps)


def noise(loaded: LoadedModel, many: int, seed: int) -> Tensor:
    """Draw noise `[many, channels, height, width]`. The noise of an image does not depend on `many`."""
    config: Any = loaded.model.config
    sides = config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size] * 2
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(config.in_channels, *sides, generator=generator) for _ in range(many)])


def schedule(loaded: LoadedModel, steps: int) -> Any:
    """Make DDIM's scheduler with the noise levels of the model's training. Raises `DataError` for too many steps."""
    import diffusers

    ddim: Any = diffusers.DDIMScheduler
    scheduler = ddim.from_config(loaded.processor.config)
    trained = scheduler.config.num_train_timesteps
    if steps > trained:
        raise DataError(f"the model was trained with {trained} steps of noise, fewer than steps={steps}")
    scheduler.set_timesteps(steps)
    return scheduler


def walk(loaded: LoadedModel, images: Tensor, scheduler: Any) -> Iterator[Tensor]:
    """Yield the images after each step of the path that starts from `images`, in float32 on the CPU."""
    for time in scheduler.timesteps.tolist():
        predicted = loaded.model(**arguments(loaded, images, time)).sample.float().cpu()
        images = scheduler.step(predicted, time, images).prev_sample
        yield images


def paths(loaded: LoadedModel, start: Tensor, scheduler: Any, run: Run) -> Tensor:
    """Return all images of the paths, from the noise to the last step: `[steps + 1, images, …]`."""
    batches, found = start.split(run.batch_size), []
    with torch.no_grad():
        for images in run.track(batches, len(batches), "images"):
            found.append(torch.stack([images, *walk(loaded, images, scheduler)]))
    return torch.cat(found, 1)


def images(loaded: LoadedModel, start: Tensor, scheduler: Any, run: Run) -> Iterator[Tensor]:
    """Yield the images at the end of the paths, `[images, …]`, batch by batch."""
    batches = start.split(run.batch_size)
    for batch in run.track(batches, len(batches), "images"):
        with torch.no_grad():
            *_, end = walk(loaded, batch, scheduler)
        yield end


def draw_inputs(loaded: LoadedModel, scheduler: Any, samples: int, seed: int) -> list[Any]:
    """Draw inputs from the model's own paths, each at a random step, as Q-Diffusion does (arXiv 2302.04304)."""
    path, times = paths(loaded, noise(loaded, samples, seed), scheduler, Run()), scheduler.timesteps.tolist()
    steps = torch.randint(len(times), (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [arguments(loaded, path[step, i : i + 1], times[step]) for i, step in enumerate(steps)]


def arguments(loaded: LoadedModel, images: Tensor, time: int) -> dict[str, Any]:
    """Return the model's arguments for images at one time of the path."""
    return {
        "sample": images.to(device(loaded), dtype(loaded)),
        "timestep": torch.full((len(images),), time, device=device(loaded)),
    }
