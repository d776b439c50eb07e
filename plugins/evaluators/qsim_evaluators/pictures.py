"""Convert images to bytes, and write two sets of images side by side to a PNG."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 48
"""The least pixels of an image's side. A smaller image is enlarged by a whole factor."""
MOST = 64
GAP = 4


def as_bytes(images: Tensor) -> Tensor:
    """Convert pixels from -1 to 1 to uint8 from 0 to 255. Values outside are clipped, NaN is grey, uint8 stays."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float().nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_side_by_side(left: Tensor, right: Tensor, file: Path) -> None:
    """Write a PNG of the first images of both, `[images, channels, height, width]`, in the same order.

    Pixels are from -1 to 1, or uint8.
    """
    from PIL import Image

    panels = torch.cat([_grid(left[:MOST]), _grid(right[:MOST])], 2)
    array = panels.permute(1, 2, 0).squeeze(2).numpy()
    Image.fromarray(array).save(file)


def _grid(images: Tensor) -> Tensor:
    """Arrange images row by row in a square, in uint8 `[channels, height, width]`.

    White space surrounds each image, with more of it on both sides of the square.
    """
    images = images[:, :1] if images.shape[1] not in (1, 3) else images
    pixels = as_bytes(images)
    times = -(-SMALLEST // min(pixels.shape[2:]))
    pixels = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3)
    pixels = F.pad(pixels, (GAP, GAP, GAP, GAP), value=255)
    columns = math.ceil(math.sqrt(len(pixels)))
    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, torch.full((missing, *pixels.shape[1:]), 255, dtype=torch.uint8)])
    rows = [torch.cat(list(row), 2) for row in pixels.split(columns)]
    return F.pad(torch.cat(rows, 1), (GAP, GAP), value=255)
