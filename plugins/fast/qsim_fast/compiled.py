"""Compile the C++ sources of other plugins for this processor."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from torch import Tensor

from qsim_core import Scheme
from qsim_core.formats.rounding import Steps
from qsim_fast.kernels import native
from qsim_fast.kernels.arguments import Grid
from qsim_fast.quantizing import rounding_rule_for


class Compiled:
    """A compiled source. The source may include `grid.h`."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.functions = functions
        """The functions that the source exports."""

    @staticmethod
    def rule(scheme: Scheme, x: Tensor) -> Steps | None:
        """Give the rule by which a scheme rounds such a tensor under given scales; None: only the scheme can."""
        return rounding_rule_for(scheme, x)

    @staticmethod
    def grid(steps: Steps) -> Any:
        """Give the values of a format as a pointer to `Grid` in grid.h."""
        return ctypes.pointer(Grid.of(steps))


def compiled(source: Path, elements: int) -> Compiled | None:
    """Compile the source once Python has done as much work as the compiler takes; None before, or without a compiler.

    `elements` is the work of this call, in elements that are quantized.
    """
    library = native.compiled(source, elements)
    return None if library is None else Compiled(library)
