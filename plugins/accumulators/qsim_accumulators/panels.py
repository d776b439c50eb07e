"""Rows in the order in which native code reads them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LANES = 16
"""Columns of a product that native code computes at a time."""


def panels(rows: Tensor, length: int, fill: int = 0) -> Tensor:
    """Put numbers `[N, K]` into panels of 16 rows: `[ceil(N / 16), length, 16]`, filled up."""
    padded = padded_to(rows, length, fill, -len(rows) % LANES)
    return padded.view(-1, LANES, length).transpose(1, 2).contiguous()


def padded_to(rows: Tensor, length: int, fill: int = 0, more_rows: int = 0) -> Tensor:
    """Fill up numbers `[M, K]` to `[M + more_rows, length]`."""
    return F.pad(rows, (0, length - rows.shape[-1], 0, more_rows), value=fill).contiguous()
