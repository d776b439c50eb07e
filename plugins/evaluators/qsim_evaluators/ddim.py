"""Images out of noise by DDIM's deterministic path (arXiv 2010.02502, η = 0), for models with a scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from qsim_core import Data, DataError, Evaluator, LoadedModel, Run
from qsim_evaluators.fitting import check, device, dtype


class FromNoise(Evaluator):
    """An evaluator that makes images of noise: what the path there has to offer for calibration and audit."""

    steps: PositiveInt

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Places on the model's own paths, each at a step of its own; data have no part in them."""
        if length is not None:
            raise DataError("images have no length; leave --calibration-seqlen out")
        return drawn(loaded, self.scheduler(loaded), samples, seed)

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any]:
        """One image's noise at the first step."""
        first, *_ = self.scheduler(loaded).timesteps.tolist()
        return arguments(loaded, noise(loaded, 1, 0), first)

    def scheduler(self, loaded: LoadedModel) -> Any:
        """DDIM's, for these steps. Raises `DataError` for a model that makes no images of noise."""
        check(self.name, loaded)
        return schedule(loaded, self.steps)


def noise(loaded: LoadedModel, many: int, seed: int) -> Tensor:
    """`[many, channels, height, width]`; an image's noise does not depend on how many there are."""
    config: Any = loaded.model.config
    sides = config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size] * 2
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(config.in_channels, *sides, generator=generator) for _ in range(many)])


def schedule(loaded: LoadedModel, steps: int) -> Any:
    """DDIM's scheduler under the noise that the model was trained with. Raises `DataError` for too many steps."""
    import diffusers

    ddim: Any = diffusers.DDIMScheduler
    scheduler = ddim.from_config(loaded.processor.config)
    trained = scheduler.config.num_train_timesteps
    if steps > trained:
        raise DataError(f"the model knows {trained} steps of noise, fewer than steps={steps}")
    scheduler.set_timesteps(steps)
    return scheduler


def walk(loaded: LoadedModel, images: Tensor, scheduler: Any) -> Iterator[Tensor]:
    """The images after each step of the path that starts from the given ones, in float32 on the CPU."""
    for time in scheduler.timesteps.tolist():
        predicted = loaded.model(**arguments(loaded, images, time)).sample.float().cpu()
        images = scheduler.step(predicted, time, images).prev_sample
        yield images


def paths(loaded: LoadedModel, start: Tensor, scheduler: Any, run: Run) -> Tensor:
    """`[steps + 1, images, …]`: the images from noise to end."""
    batches, found = start.split(run.batch_size), []
    with torch.no_grad():
        for images in run.track(batches, len(batches), "images"):
            found.append(torch.stack([images, *walk(loaded, images, scheduler)]))
    return torch.cat(found, 1)


def images(loaded: LoadedModel, start: Tensor, scheduler: Any, run: Run) -> Iterator[Tensor]:
    """The ends of the paths, `[images, …]` batch by batch."""
    batches = start.split(run.batch_size)
    for batch in run.track(batches, len(batches), "images"):
        with torch.no_grad():
            *_, end = walk(loaded, batch, scheduler)
        yield end


def drawn(loaded: LoadedModel, scheduler: Any, samples: int, seed: int) -> list[Any]:
    """Places on the model's own paths, each at a step of its own, as Q-Diffusion draws them (arXiv 2302.04304)."""
    path, times = paths(loaded, noise(loaded, samples, seed), scheduler, Run()), scheduler.timesteps.tolist()
    steps = torch.randint(len(times), (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [arguments(loaded, path[step, i : i + 1], times[step]) for i, step in enumerate(steps)]


def arguments(loaded: LoadedModel, images: Tensor, time: int) -> dict[str, Any]:
    """What the model takes for images that are at one time of the path."""
    return {
        "sample": images.to(device(loaded), dtype(loaded)),
        "timestep": torch.full((len(images),), time, device=device(loaded)),
    }
