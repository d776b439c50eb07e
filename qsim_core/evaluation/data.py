"""What a model is evaluated on, and what transforms look at."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Data:
    """What a model is evaluated on; `sha256` tells whether two runs saw the same."""

    name: str
    content: Any
    sha256: str

    @classmethod
    def of_text(cls, name: str, text: str) -> Data:
        """Text, with the SHA-256 of its UTF-8 bytes."""
        return cls(name, text, hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class Calibration:
    """Which data transforms look at: `samples` of them, of `length` (tokens; none: what the evaluator takes)."""

    source: str | None = None
    samples: int = 32
    length: int | None = None
