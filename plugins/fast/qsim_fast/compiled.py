"""C++ sources of other plugins, compiled for this processor."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from torch import Tensor

from qsim_core import Scheme
from qsim_core.formats.rounding import Steps
from qsim_fast.kernels import native
from qsim_fast.kernels.interface import Grid
from qsim_fast.quantizing import rule_at


class Compiled:
    """A compiled source, which may include `grid.h`."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        """The functions that the source exports."""

    @staticmethod
    def rule(scheme: Scheme, x: Tensor) -> Steps | None:
        """The rule by which a scheme rounds such a tensor under given scales; None: only the scheme knows."""
        return rule_at(scheme, x)

    @staticmethod
    def grid(steps: Steps) -> Any:
        """The values of a format as `Grid` in grid.h, to be passed by pointer."""
        return ctypes.pointer(Grid.of(steps))


def compiled(source: Path, elements: int) -> Compiled | None:
    """The compiled source, once Python has done as much work as the compiler takes; None before, or without one."""
    path = native.compiled(source, elements)
    return None if path is None else _opened(path)


@functools.cache
def _opened(path: Path) -> Compiled:
    return Compiled(path)
