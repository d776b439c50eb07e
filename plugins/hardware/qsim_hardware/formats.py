"""Number formats as hardware sees them: which one holds another's values, and the bits that a multiplier needs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import qsim_core as qsim
from qsim_core.simulation.work import TensorWork

OF_DTYPE = {torch.bfloat16: "fp.bf16", torch.float16: "fp.fp16"}
"""The formats of elements that are not quantized; float32 has no table of its values."""
FLOAT32_SIGNIFICAND = 24


def format_of(tensor: TensorWork) -> qsim.Format | None:
    """The format of the elements of a tensor; None: float32, or wider."""
    if tensor.format is not None:
        return tensor.format
    text = OF_DTYPE.get(tensor.dtype)
    return None if text is None else _parsed(text)


def name_of(tensor: TensorWork) -> str:
    """The name of the elements' format or dtype."""
    return str(tensor.dtype).removeprefix("torch.") if tensor.format is None else str(tensor.format)


@functools.lru_cache(maxsize=1024)
def holds(wide: qsim.Format, narrow: qsim.Format) -> bool:
    """True if every value of the narrow format is a value of the wide one, whose codes may all be used."""
    values = _values(narrow)
    return torch.equal(wide.full().replace(rounding="even").round(values), values)


@functools.lru_cache(maxsize=256)
def significand_bits(format: qsim.Format | None) -> int:
    """The bits of the longest significand of a format: 4 for E4M3, the hidden bit counted; 24 for None, float32."""
    if format is None:
        return FLOAT32_SIGNIFICAND
    fractions = torch.frexp(_values(format)).mantissa
    lengths = range(1, FLOAT32_SIGNIFICAND)
    whole = (bits for bits in lengths if torch.equal((scaled := fractions * 2.0**bits).round(), scaled))
    return next(whole, FLOAT32_SIGNIFICAND)


def _values(format: qsim.Format) -> Tensor:
    table = format.table()
    return table[table.isfinite()]


@functools.cache
def _parsed(text: str) -> qsim.Format:
    return qsim.parse(text)  # type: ignore[no-any-return]
