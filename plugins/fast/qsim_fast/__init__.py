"""Exact arithmetics for qsim: they compute products faster, with the numbers of the float32 reference."""

from __future__ import annotations

from qsim_core import Arithmetic, hookimpl
from qsim_fast.arithmetics import BF16, FP8, INT8, TF32, Blockwise, INT8Blocks


@hookimpl
def qsim_arithmetics() -> list[type[Arithmetic]]:
    return [INT8, INT8Blocks, BF16, Blockwise, TF32, FP8]
