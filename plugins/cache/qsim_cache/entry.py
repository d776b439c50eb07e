"""A value that later runs with the same work directory can use."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from qsim_cache.fingerprint import Unknowable, sha256
from qsim_core.files import keep, kept

ENDING = ".kept"
KINDS = ("baseline", "statistics")
"""Metrics of models as they are, and what static scales are fitted to."""
LARGEST = 2**28
"""Bytes of the largest value that is kept: blocks along wide rows have a histogram each."""


class CacheEntry:
    """A value in a work directory, computed or not yet, found by the digest of everything that decides it.

    Several runs may share a directory; two of them may compute the same entry.
    """

    def __init__(self, work_dir: Path, kind: str, made_from: Iterable[Any], **about: str) -> None:
        digest = sha256(itertools.chain([kind], made_from))  # one after another: they may not fit into memory
        self.path, self.about = work_dir / kind / f"{digest}{ENDING}", about

    def get(self) -> Any:
        """The value: numbers, texts and tensors in mappings and lists. None if there is no entry."""
        return kept(self.path)

    def put(self, value: Any) -> None:
        """Keep a value."""
        keep(self.path, value, LARGEST, **self.about)

    @classmethod
    def of(cls, work_dir: Path, kind: str, made_from: Iterable[Any], **about: str) -> Self | None:
        """The entry; None where something that decides the value is not known."""
        try:
            return cls(work_dir, kind, made_from, **about)
        except Unknowable:
            return None
