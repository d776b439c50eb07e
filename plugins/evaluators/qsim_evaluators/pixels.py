"""Read images from files and from `datasets`, and convert them to inputs of a vision model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qsim_core import DataError, LoadedModel
from qsim_evaluators.fitting import device, dtype
from qsim_evaluators.text import read_rows


def image_rows(source: str, columns: list[str], split: str) -> Any:
    """Read a data set with these columns, the first of which has images. Raises `DataError`."""
    import datasets

    rows = read_rows(source, columns, split)
    if not isinstance(rows.features[columns[0]], datasets.Image):
        raise DataError(f"column {columns[0]!r} of {source!r} holds {rows.features[columns[0]]}, not images")
    return rows


def image_files(directory: Path) -> Any:
    """Read the image files in a directory, sorted by name, as a data set with the column `image`.

    Returns None if there are no image files. A file `metadata` in CSV, JSON lines or Parquet adds columns for each
    `file_name`.
    """
    import datasets
    from PIL import Image

    endings = Image.registered_extensions()
    if any((directory / f"metadata.{kind}").exists() for kind in ("csv", "jsonl", "parquet")):
        try:
            return datasets.load_dataset("imagefolder", data_dir=str(directory), split="train")
        except Exception as error:  # its loaders raise errors of any class
            raise DataError(f"datasets cannot load {directory}: {' '.join(str(error).split())[:200]}") from None
    files = sorted(str(file) for file in directory.iterdir() if file.suffix.lower() in endings)
    return datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image()) if files else None


def encoded(rows: Any, column: str) -> Iterator[bytes]:
    """Yield the images of a data set as stored bytes."""
    import datasets

    for row in rows.select_columns(column).cast_column(column, datasets.Image(decode=False)):
        yield row[column]["bytes"] or Path(row[column]["path"]).read_bytes()


def pixels(loaded: LoadedModel, images: Sequence[Any], first: int = 0) -> Tensor:
    """Convert images to the model's inputs `[images, channels, height, width]` with its own processor.

    Images are PIL images or uint8 arrays `[height, width]` or `[height, width, 3]`. Messages number them from `first`.
    Raises `DataError` for images that the model cannot take.
    """
    config: Any = getattr(loaded.model, "config", None)
    config = getattr(config, "vision_config", config)
    channels = None if config is None else getattr(config, "num_channels", 3)
    prepared = [picture(image, first + place, channels) for place, image in enumerate(images)]
    found: Tensor = loaded.processor(prepared, return_tensors="pt")["pixel_values"]
    size = getattr(config, "image_size", None)
    if size is not None and tuple(found.shape[1:]) != (expected := (channels, *sides(size))):
        raise DataError(
            f"image {first} becomes {shape_in_words(found.shape[1:])}, the model takes {shape_in_words(expected)} "
            f"(channels, height, width): its processor does not fit it"
        )
    return found.to(device(loaded), dtype(loaded))


def picture(image: Any, place: int, channels: int | None) -> Any:
    """Convert an image to a PIL image with the model's channels. Grey becomes RGB; RGB never becomes grey.

    Without a number of channels an image keeps its own: only the model's processor knows what the model takes.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = image.numpy() if isinstance(image, Tensor) else image
        if str(array.dtype) != "uint8" or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
            raise DataError(
                f"image {place} is {array.dtype} of shape {tuple(array.shape)}; "
                f"expected uint8, [height, width] or [height, width, 3]"
            )
        image = Image.fromarray(array)
    if channels is None:
        return image
    if channels == 1 and image.mode not in ("1", "L"):
        raise DataError(f"image {place} has mode {image.mode}, the model takes one channel; convert the images to 'L'")
    return image.convert("L" if channels == 1 else "RGB")


def sides(size: Any) -> tuple[int, int]:
    """Return height and width. A configuration may have one number for both."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


def shape_in_words(shape: Any) -> str:
    """Write a shape in words: `3 by 224 by 224`."""
    return " by ".join(map(str, shape))
