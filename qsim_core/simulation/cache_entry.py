"""A value that later runs with the same work directory can use."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch

from qsim_core.simulation.fingerprint import Unknowable
from qsim_core.simulation.store import Store
from qsim_core.transforms.checkpoint import sha256

LARGEST = 2**28
"""Bytes of the largest value that is kept: blocks along wide rows have a histogram each."""


class CacheEntry:
    """A value of a store, computed or not yet, found by the digest of everything that decides it."""

    def __init__(self, work_dir: Path, kind: str, made_from: Iterable[Any], **about: str) -> None:
        self.store, self.about = Store(work_dir, kind), about
        self.digest = sha256(itertools.chain([kind], made_from))  # one after another: they may not fit into memory

    def get(self) -> Any:
        """The value: numbers, texts and tensors in mappings and lists. None if there is no entry."""
        content = self.store.get(self.digest)
        try:
            return None if content is None else torch.load(io.BytesIO(content), weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            return None

    def put(self, value: Any) -> None:
        """Keep a value."""
        file = io.BytesIO()
        torch.save(value, file)
        if file.tell() <= LARGEST:
            self.store.put(self.digest, file.getvalue(), **self.about)

    @classmethod
    def of(cls, work_dir: Path | None, kind: str, made_from: Iterable[Any], **about: str) -> Self | None:
        """The entry; None without a work directory, or where something that decides the value is not known."""
        try:
            return None if work_dir is None else cls(work_dir, kind, made_from, **about)
        except Unknowable:
            return None
