"""Data for evaluation, and the choice of data for transforms."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from qsim_core.errors import DataError, file_did_you_mean
from qsim_core.files import place


@dataclass(frozen=True)
class Data:
    """Data that a model is evaluated on; two runs with the same `sha256` have seen the same data."""

    name: str
    content: Any
    sha256: str

    @classmethod
    def of_text(cls, name: str, text: str) -> Data:
        """Text, with the SHA-256 of its UTF-8 bytes."""
        return cls(name, text, hashlib.sha256(text.encode()).hexdigest())


def check_source(source: str) -> None:
    """Raise `DataError` for the name of a file that is not there. Any other name may be one of `datasets`."""
    path = place(source)
    named = place(source.partition(":")[0])
    if not path.exists() and not named.is_dir() and (source.startswith((".", "/", "~")) or path.suffix):
        raise DataError(f"there is no file {source}{file_did_you_mean(path)}")


@dataclass(frozen=True)
class Calibration:
    """The data for transforms and static scales: `samples` of `length` tokens (none: the evaluator's own length).

    `seed` draws the samples (none: the run's seed).
    """

    source: str | None = None
    samples: int = 32
    length: int | None = None
    seed: int | None = None
