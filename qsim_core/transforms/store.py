"""The store of a run, which keeps things for later runs. A plugin brings it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn


class Entry(Protocol):
    """The place of one value."""

    def get(self) -> Any:
        """The value: numbers, texts and tensors in mappings and lists. None if it is not there."""

    def put(self, value: Any) -> None:
        """Keep a value."""


class Blocks(Protocol):
    """One transform's finished blocks."""

    def save(self, index: int, block: nn.Module, said: dict[str, Any]) -> None:
        """Keep a finished block's tensors, and what was said about it (plain data)."""

    def restore(self, index: int, block: nn.Module) -> Mapping[str, Any] | None:
        """Give a block the tensors that were kept, if they were; what was said about it."""


class Store(Protocol):
    """Keeps what later runs can use. A value is found again by everything that decides it."""

    def blocks(self, model: nn.Module, batches: Sequence[Any], recipe: Any, *texts: str) -> Blocks | None:
        """The blocks of the transform that the recipe, these texts, the model as it is now and the data describe.

        None where they cannot be told from others.
        """

    def statistics(self, model: nn.Module, value_axis: str, wanted: Any, batches: Sequence[Any]) -> Entry | None:
        """The place of the statistics for static scales; None where they cannot be told from others."""

    def baseline(self, evaluate: Callable[[], dict[str, float]], *made_from: Any) -> tuple[dict[str, float], bool]:
        """The baseline's metrics, evaluated or kept; True if an earlier run had measured them."""
