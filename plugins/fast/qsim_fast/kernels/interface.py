"""What the kernels of the CPU and of a GPU are told, and what both can do."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from typing import Literal, Protocol

import torch
from torch import Tensor

from qsim_core.formats.rounding import FLOAT32_MANTISSA, Steps

CPU = torch.device("cpu")


class Grid(ctypes.Structure):
    """`Grid` in kernels.cpp."""

    _fields_ = [
        ("low", c_float),
        ("high", c_float),
        ("overflow", c_float),
        ("bound", c_float),
        ("smallest", c_float),
        ("magic", c_float),
        ("fixed", c_int32),
        ("signed_zero", c_int32),
    ]

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, steps: Steps) -> Grid:
        overflow = steps.high if steps.overflow is None else steps.overflow
        magic, smallest = 1.5 * 2.0 ** (FLOAT32_MANTISSA - steps.mantissa), 2.0**steps.min_exponent
        return cls(steps.low, steps.high, overflow, steps.bound, smallest, magic, steps.fixed, steps.signed_zero)


class Scaling(ctypes.Structure):
    """`Scaling` in kernels.cpp."""

    _fields_ = [
        ("rule", c_int32),
        ("rounding", c_int32),
        ("zero_points", c_int32),
        ("magnitude", c_int32),
        ("absmax", c_int32),
        ("reach", c_float),
        ("largest", c_float),
        ("top", c_int32),
        ("tie", c_double),
        ("limit", c_float),
        ("second", c_float),
        ("grid", Grid),
    ]


class Task(ctypes.Structure):
    """`Task` in kernels.cpp."""

    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("block", c_int64),
        ("scale", c_void_p),
        ("scale_row", c_int64),
        ("scale_block", c_int64),
        ("zero", c_void_p),
        ("shift", c_float),
        ("out_row", c_int64),
        ("threads", c_int32),
        ("saturate", c_int32),
        ("scaling", Scaling),
    ]


GIVEN = Scaling(rule=0)
"""Scales are given, or there are none."""


Part = Literal["", "scale", "second"]
"""What results are written without: the scale of their block, or the scale that all scales have."""


class Kernels(Protocol):
    """What quantizes in one pass over memory: `Library` on the CPU, `gpu.GpuLibrary` on a GPU."""

    longest: float
    """Blocks up to here are measured and rounded in one pass."""
    parts: bool
    """Whether results may be floats `without` a part."""

    def extremes(self, x: Tensor, block: int, magnitude: bool) -> tuple[Tensor | None, Tensor]:
        """The lowest (None of magnitudes) and the highest value of each block of x [A, K]: [A, ceil(K / block)]."""

    def round(
        self,
        x: Tensor,
        out: Tensor,
        steps: Steps,
        block: int,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        shift: float = 0.0,
        scaling: Scaling = GIVEN,
        second: float | Tensor = 1.0,
        without: Part = "",
    ) -> Tensor:
        """x [A, K] rounded into `out`, as values of its dtype or as int8 codes; scales and zeros [A or 1, B or 1].

        `scaling` says how they are found, and they are written; else they are given. `second` is the scale of the
        scales. Without a scale the format is by itself, and what is too large becomes what it says.
        """

    def any_below(self, x: Tensor, bound: float) -> bool:
        """Whether a bfloat16 tensor holds a value other than zero whose magnitude is below a power of two."""

    def scale_sums(
        self,
        sums: Tensor,
        rows: tuple[Tensor, Tensor | None, Tensor | None],
        columns: tuple[Tensor, Tensor | None, Tensor | None],
        bias: Tensor | None,
    ) -> Tensor:
        """Integer sums [M, N] as float32 in the same memory; for rows and columns scale, zero points and sums of codes.

        The formula is `qsim_fast.int8`'s.
        """


@functools.cache
def bits(x: float) -> int:
    """A number's bits in bfloat16."""
    return int(torch.tensor(x, dtype=torch.bfloat16).view(torch.int16))


def buffer(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """Memory, whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device=device)
