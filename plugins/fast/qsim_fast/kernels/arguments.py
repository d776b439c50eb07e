"""The arguments of the kernels: structures that kernels.cpp reads, and memory for results."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from qsim_core.formats.rounding import FLOAT32_MANTISSA, Steps

CPU = torch.device("cpu")


class Grid(ctypes.Structure):
    """The values of a number format: `Grid` in grid.h."""

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
        """Turn the rounding rule of a format into this structure."""
        overflow = steps.high if steps.overflow is None else steps.overflow
        magic, smallest = 1.5 * 2.0 ** (FLOAT32_MANTISSA - steps.mantissa), 2.0**steps.min_exponent
        return cls(steps.low, steps.high, overflow, steps.bound, smallest, magic, steps.fixed, steps.signed_zero)


class Scaling(ctypes.Structure):
    """The rule by which a kernel computes the scales of blocks: `Scaling` in kernels.cpp."""

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
        ("tensor_scale", c_float),
        ("grid", Grid),
    ]


class Task(ctypes.Structure):
    """One call of `round_to_grid`: `Task` in kernels.cpp."""

    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("block", c_int64),
        ("scale", c_void_p),
        ("scale_row", c_int64),
        ("scale_block", c_int64),
        ("zero", c_void_p),
        ("unit", c_float),
        ("shift", c_float),
        ("out_row", c_int64),
        ("threads", c_int32),
        ("saturate", c_int32),
        ("scaling", Scaling),
    ]


GIVEN = Scaling(rule=0)
"""The scales are given, or absent."""


@functools.cache
def bfloat16_bits(x: float) -> int:
    """Give the bits of a number in bfloat16."""
    return int(torch.tensor(x, dtype=torch.bfloat16).view(torch.int16))


def buffer(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """Allocate memory, independent of torch's default dtype and device."""
    return torch.empty(shape, dtype=dtype, device=device)


class BlockProduct(ctypes.Structure):
    """A product of codes: `BlockProduct` in blocks.cpp."""

    _fields_ = [
        ("x", c_void_p),
        ("x_matrix", c_int64),
        ("x_row", c_int64),
        ("x_scale", c_void_p),
        ("x_scale_matrix", c_int64),
        ("x_scale_row", c_int64),
        ("x_every", c_int64),
        ("w", c_void_p),
        ("w_matrix", c_int64),
        ("w_panel", c_int64),
        ("w_scale", c_void_p),
        ("w_scale_matrix", c_int64),
        ("w_scale_panel", c_int64),
        ("w_every", c_int64),
        ("w_sum", c_void_p),
        ("w_sum_matrix", c_int64),
        ("w_sum_panel", c_int64),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("y_matrix", c_int64),
        ("y_row", c_int64),
        ("matrices", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("inner", c_int64),
        ("block", c_int64),
        ("piece", c_int64),
        ("offset", c_int32),
        ("wrapped", c_int32),
        ("kind", c_int32),
        ("threads", c_int32),
    ]


class Columns(ctypes.Structure):
    """Columns that are to be packed: `Columns` in blocks.cpp."""

    _fields_ = [
        ("codes", c_void_p),
        ("matrix", c_int64),
        ("row", c_int64),
        ("scale", c_void_p),
        ("scale_matrix", c_int64),
        ("scale_row", c_int64),
        ("scales", c_int64),
        ("w", c_void_p),
        ("w_scale", c_void_p),
        ("w_sum", c_void_p),
        ("matrices", c_int64),
        ("columns", c_int64),
        ("length", c_int64),
        ("inner", c_int64),
        ("piece", c_int64),
        ("kind", c_int32),
        ("threads", c_int32),
    ]
