"""Make images from texts with a pipeline, each from its own noise drawn by a seed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsim_core import DataError, LoadedModel, Run
from qsim_core.errors import with_article
from qsim_evaluators.fitting import check

TAKES = {"prompt", "generator", "num_inference_steps", "output_type"}


@dataclass(frozen=True)
class FromTexts:
    """Makes images of prompts with a pipeline, for the evaluator named `evaluator`."""

    evaluator: str
    steps: int
    guidance: float | None
    """Scale of classifier-free guidance; None: the pipeline's own."""

    def images(self, loaded: LoadedModel, prompts: Sequence[str], run: Run) -> Iterator[Tensor]:
        """Yield batches `[images, channels, height, width]` in float32 on the CPU, with one image for each prompt.

        Pixels are from -1 to 1. The noise of an image does not depend on the number of images. Raises `DataError`.
        """
        seeds = _seeds(len(prompts), run.seed)
        places = [slice(start, start + run.batch_size) for start in range(0, len(prompts), run.batch_size)]
        for batch in run.track(places, len(places), "prompts"):
            with torch.no_grad():
                made = loaded.model(**self._arguments(loaded, prompts[batch], seeds[batch])).images
            yield 2 * made.float().cpu() - 1

    def example(self, loaded: LoadedModel, prompts: Sequence[str]) -> dict[str, Any]:
        """Return the first prompt, with few steps. Raises `DataError`."""
        return self._arguments(loaded, prompts[:1], [0]) | {"num_inference_steps": min(self.steps, 2)}

    def calibration(
        self, loaded: LoadedModel, prompts: Sequence[str], samples: int, length: int | None, seed: int
    ) -> list[dict[str, Any]]:
        """Draw prompts and their noise, each for a run of all steps. Raises `DataError`."""
        if length is not None:
            raise DataError("images have no length; leave --calibration-seqlen out")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(prompts), (samples,), generator=generator).tolist()
        # `images` draws seeds below 2**31, so calibration has other noise
        noise = torch.randint(2**31, 2**32, (samples,), generator=generator).tolist()
        return [self._arguments(loaded, [prompts[place]], [noise[i]]) for i, place in enumerate(drawn)]

    def _arguments(self, loaded: LoadedModel, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """Return the pipeline's arguments. Raises `DataError` if the model does not make images from texts."""
        if not makes_images_of_texts(loaded):
            check(self.evaluator, loaded)
            name = with_article(type(loaded.model).__name__)
            raise DataError(f"{self.evaluator} needs a pipeline that makes images from texts, not {name}")
        if self.guidance is not None and "guidance_scale" not in _parameters(loaded):
            raise DataError(f"{_class(loaded).__name__} has no guidance_scale; leave guidance out")
        return {
            "prompt": list(prompts),
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": self.steps,
            "output_type": "pt",
        } | ({} if self.guidance is None else {"guidance_scale": self.guidance})


def makes_images_of_texts(loaded: LoadedModel) -> bool:
    """Tell if the model is a pipeline of diffusers that takes prompts."""
    return _parameters(loaded) >= TAKES


def _parameters(loaded: LoadedModel) -> set[str]:
    return set(inspect.signature(_class(loaded).__call__).parameters)


def _class(loaded: LoadedModel) -> Any:
    return type(getattr(loaded.model, "pipeline", loaded.model))


def _seeds(many: int, seed: int) -> list[int]:
    found: list[int] = torch.randint(2**31, (many,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found
