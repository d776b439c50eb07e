"""Images from files and from `datasets`, and what a vision model takes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qsim_core import DataError, LoadedModel
from qsim_evaluators.fitting import device, dtype
from qsim_evaluators.text import read_rows


def image_rows(source: str, columns: list[str], split: str) -> Any:
    """A data set with these columns, the first of them images. Raises `DataError`."""
    import datasets

    rows = read_rows(source, columns, split)
    if not isinstance(rows.features[columns[0]], datasets.Image):
        raise DataError(f"column {columns[0]!r} of {source!r} holds {rows.features[columns[0]]}, no images")
    return rows


def image_files(directory: Path) -> Any:
    """The image files that lie in a directory, by name, as a data set with the column `image`; none: None.

    A file `metadata` in CSV, JSON lines or Parquet says what goes with each `file_name`, in more columns.
    """
    import datasets
    from PIL import Image

    endings = Image.registered_extensions()
    if any((directory / f"metadata.{kind}").exists() for kind in ("csv", "jsonl", "parquet")):
        try:
            return datasets.load_dataset("imagefolder", data_dir=str(directory), split="train")
        except Exception as error:  # datasets raises whatever its many loaders raise
            raise DataError(f"datasets cannot load {directory}: {' '.join(str(error).split())[:200]}") from None
    files = sorted(str(file) for file in directory.iterdir() if file.suffix.lower() in endings)
    return datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image()) if files else None


def encoded(rows: Any, column: str) -> Iterator[bytes]:
    """The images of a data set as they are stored."""
    import datasets

    for row in rows.select_columns(column).cast_column(column, datasets.Image(decode=False)):
        yield row[column]["bytes"] or Path(row[column]["path"]).read_bytes()


def pixels(loaded: LoadedModel, images: Sequence[Any], first: int = 0) -> Tensor:
    """What the model's own processor makes of images, `[images, channels, height, width]`.

    They are PIL images or uint8 arrays `[height, width]` or `[height, width, 3]`; messages count them from `first`.
    Raises `DataError` for images that the model cannot take.
    """
    config: Any = loaded.model.config
    config = getattr(config, "vision_config", config)
    channels = getattr(config, "num_channels", 3)
    prepared = [picture(image, first + place, channels) for place, image in enumerate(images)]
    found: Tensor = loaded.processor(prepared, return_tensors="pt")["pixel_values"]
    size = getattr(config, "image_size", None)
    if size is not None and tuple(found.shape[1:]) != (expected := (channels, *sides(size))):
        raise DataError(
            f"image {first} becomes {by(found.shape[1:])}, the model takes {by(expected)} "
            f"(channels, height, width): its processor does not fit it"
        )
    return found.to(device(loaded), dtype(loaded))


def picture(image: Any, place: int, channels: int) -> Any:
    """A PIL image of as many channels as the model takes: grey becomes RGB, RGB is never made grey unasked."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = image.numpy() if isinstance(image, Tensor) else image
        if str(array.dtype) != "uint8" or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
            raise DataError(
                f"image {place} is {array.dtype} of shape {tuple(array.shape)}; "
                f"expected uint8, [height, width] or [height, width, 3]"
            )
        image = Image.fromarray(array)
    if channels == 1 and image.mode not in ("1", "L"):
        raise DataError(f"image {place} has mode {image.mode}, the model takes one channel; convert the images to 'L'")
    return image.convert("L" if channels == 1 else "RGB")


def sides(size: Any) -> tuple[int, int]:
    """Height and width, of which a configuration may name one for both."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


def by(shape: Any) -> str:
    """A shape in words: `3 by 224 by 224`."""
    return " by ".join(map(str, shape))
