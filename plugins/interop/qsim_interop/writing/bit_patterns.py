"""The number formats that files hold, by the values of their bit patterns, and how codes are packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsim_core.formats.format import Format

HALF = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
TABLES = {
    "e2m1": torch.cat([HALF, -HALF]),
    "e4m3": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double(),
    "e8m0": torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).double(),
    "fp16": torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16).double(),
}
"""The value of each code. OCP MX v1.0, section 5.3, and IEEE 754 binary16."""


def is_format(element: Any, name: str) -> bool:
    """Tell if a quantizer is the number format of a name, code by code."""
    if not isinstance(element, Format):
        return False
    table, known = element.table(), TABLES[name]
    return table.shape == known.shape and bool(((table == known) | (table.isnan() & known.isnan())).all())


def nibbles(codes: Tensor) -> Tensor:
    """Pack codes of four bits two to a byte, the even column in the low nibble: uint8 [N, K / 2]."""
    pairs = codes.unflatten(-1, (-1, 2))
    packed: Tensor = pairs[..., 0] | pairs[..., 1] << 4
    return packed


def words(codes: Tensor, width: int) -> Tensor:
    """Pack each row of codes of `width` bits into int32, lowest bits first: [N, K] -> [N, ceil(K * width / 32)]."""
    bits = (codes.unsqueeze(-1) >> torch.arange(width, dtype=torch.uint8) & 1).flatten(-2)
    octets = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 8))
    packed: Tensor = (octets << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return packed.view(torch.int32)
