"""The base class of formats that a simulated model can be written in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from qsim_core.errors import RecipeError
from qsim_interop.writing.layer import Layer
from qsim_interop.writing.source import Source


class Target(ABC):
    """A format of files. An author writes `check` and `write`."""

    name: ClassVar[str]
    holds: ClassVar[str]
    """The weights that the format holds exactly, for messages."""
    kinds: ClassVar[tuple[str, ...]] = ("Linear",)
    """The classes of layers whose codes it holds; "experts" are weights that stack those of a layer."""
    library: ClassVar[str | None] = None
    """The library that writes it; None: none is needed."""

    def need_library(self) -> None:
        """Raise `RecipeError` if the library that writes the format is missing."""
        if self.library is not None and find_spec(self.library) is None:
            raise RecipeError(f"--to {self.name} needs {self.library}; pip install {self.library}")

    @abstractmethod
    def check(self, source: Source) -> list[str]:
        """Raise `RecipeError` for what the format does not hold exactly; give notes on what its readers decide."""

    @abstractmethod
    def write(self, source: Source, directory: Path) -> None:
        """Write the files into an empty directory."""

    def refused(self, layer: Layer, why: str = "") -> RecipeError:
        """An error that says what a format holds in place of a layer's weight."""
        reason = f" ({why})" if why else ""
        return RecipeError(
            f"{layer.module}: {self.name} does not hold {layer.weight.quantizer} exactly{reason}; it holds {self.holds}"
        )


def only(notes: Collection[str]) -> list[str]:
    """Each note once."""
    return list(dict.fromkeys(notes))
