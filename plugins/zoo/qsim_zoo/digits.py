"""scikit-learn's digits: 1,797 grey images of 8 by 8 pixels, which its wheel contains.

The split of an image follows from a hash of its index in the data set: about 70% train, 10% valid, 20% test.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np

from qsim_core import Data

SPLITS = ("train", "valid", "test")
WHITE = 16
"""The largest value of a pixel in the data set."""


@functools.cache
def digits(split: str) -> tuple[Any, Any]:
    """Return the images of one split, uint8 `[images, 8, 8]` from 0 to 255, and their labels, int64 `[images]`."""
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    bunch = load_digits()
    mine = np.array([split_of(place) == split for place in range(len(bunch.images))])
    return np.round(bunch.images[mine] * 255 / WHITE).astype(np.uint8), bunch.target[mine].astype(np.int64)


def split_of(place: int) -> str:
    """Return the split of the image with index `place`, by SHA-256."""
    share = hashlib.sha256(f"digit {place}".encode()).digest()[0]
    return "test" if share < 51 else "valid" if share < 77 else "train"


def as_data(split: str) -> Data:
    """Return one split as data for an evaluator of images, with the SHA-256 of pixels and labels."""
    images, labels = digits(split)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    content = {"image": list(images), "label": labels.tolist()}
    return Data(f"zoo: scikit-learn's digits, {split} split", content, digest)
