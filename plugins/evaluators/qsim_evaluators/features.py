"""Features of images, computed by a given model that is never quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsim_core import DataError, LoadedModel
from qsim_core.components.host import installed
from qsim_core.errors import one_line
from qsim_core.evaluation.locate import locate
from qsim_evaluators.pixels import picture, pixels

Features = Callable[[Sequence[Any]], Tensor]
"""A function from images, in the forms that `pixels` takes, to features `[images, width]` in float32 on the CPU."""
EXPORTED = ".pt2"


def load_given(name: str, device: torch.device) -> LoadedModel:
    """Load a model of the zoo, of a directory or of the hub in float32. Raises `ModelError`."""
    located = locate(name, installed())
    loaded = located.adapter.load(located.source, torch.float32)
    loaded.model.to(device)
    return loaded


def features(name: str, device: torch.device) -> Features:
    """Return a function that computes features: the mean of a vision model's last hidden states over all positions.

    For a convolutional network these are the features that FID takes from Inception. The model may also be a program
    that `torch.export` saved in a `.pt2` file. It takes RGB images of one size, uint8 `[images, 3, height, width]`, and
    returns the features. Raises `ModelError` and `DataError`.
    """
    if Path(name).suffix == EXPORTED:
        return _of_program(name, device)
    loaded = load_given(name, device)
    model: Any = loaded.model
    base = getattr(model, "base_model", model)
    encoder = getattr(base, "vision_model", base)
    if getattr(encoder, "main_input_name", None) != "pixel_values" or loaded.processor is None:
        raise DataError(f"{name}, a {type(model).__name__}, cannot give features: it does not encode images")

    def found(images: Sequence[Any]) -> Tensor:
        with torch.no_grad():
            states: Tensor = encoder(pixel_values=pixels(loaded, images)).last_hidden_state
        return states.mean(tuple(range(2, states.dim())) if states.dim() > 3 else 1).cpu()

    return found


def describe(name: str) -> str:
    """Describe the features in words."""
    if Path(name).suffix == EXPORTED:
        return f"the outputs of {name}"
    return f"the last hidden states of {name}, averaged over positions"


def _of_program(name: str, device: torch.device) -> Features:
    try:
        program = torch.export.load(Path(name).expanduser()).module().to(device)
    except Exception as error:  # torch raises errors of many classes
        raise DataError(f"{name} cannot be loaded as a program that torch.export saved: {one_line(error)}") from None

    def found(images: Sequence[Any]) -> Tensor:
        arrays = [np.array(picture(image, place, 3)) for place, image in enumerate(images)]
        try:
            batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
            with torch.no_grad():
                outputs = program(batch.to(device))
        except Exception as error:  # a program raises its own error for other shapes
            shape = " by ".join(map(str, arrays[0].shape))
            raise DataError(f"{name} does not take {len(arrays)} images of {shape}: {one_line(error)}") from None
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(arrays):
            raise DataError(f"{name} should give one row of features for each image, [images, width]")
        return outputs.float().cpu()

    return found
