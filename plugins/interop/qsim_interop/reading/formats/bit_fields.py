"""Codes that lie side by side in integers."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def from_words(words: Tensor, width: int, count: int) -> Tensor:
    """Take `count` codes of `width` bits out of each row of int32 words, lowest bits first: uint8 [rows, count].

    A code may lie in two words.
    """
    octets = words.contiguous().view(torch.uint8).reshape(words.shape[0], -1)
    if sys.byteorder == "big":
        octets = octets.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    if width == 8:
        return octets[:, :count]
    if width == 4:
        return from_nibbles(octets)[:, :count]
    bits = (octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    fields = bits.flatten(-2)[:, : count * width].unflatten(-1, (count, width))
    codes: Tensor = (fields << torch.arange(width, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return codes


def from_nibbles(octets: Tensor) -> Tensor:
    """Take two codes of four bits out of each byte, the low one first: uint8 [rows, 2 * columns]."""
    return torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(-2)


def twos_complement(unsigned: Tensor, width: int) -> Tensor:
    """Turn codes that are stored with an offset of half their range into codes in two's complement."""
    return unsigned ^ (1 << (width - 1))
