"""Random numbers that depend on where they are used, and on nothing else.

Stochastic rounding draws from Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011, section 3.3): a number is a function of a seed, a site, a step and the element's index. So
the same tensor is rounded to the same bits on any device and by any number of threads, and no global state is touched.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Place(threading.local):
    """Where this thread draws."""

    site = 0
    step = 0
    start = 0
    rows = 1
    drawn = False
    """Whether anything was drawn here."""


_place = Place()


@contextlib.contextmanager
def at(site: str = "", step: int = 0, start: int = 0, rows: int = 1) -> Iterator[Place]:
    """Inside, numbers are those of this site (a name, of which the CRC-32 counts) and step (a count from 0).

    Where a tensor is rounded in parts, those of `rows` rows from row `start` on.
    """
    before = dict(_place.__dict__)
    _place.__dict__.update(site=zlib.crc32(site.encode()), step=step & WORD, start=start, rows=rows, drawn=False)
    try:
        yield _place
    finally:
        _place.__dict__.clear()
        _place.__dict__.update(before)


@contextlib.contextmanager
def part(start: int) -> Iterator[None]:
    """Inside, numbers are those of the `start`-th of many tensors of one shape that are drawn for one place."""
    before = _place.start, _place.rows
    _place.start, _place.rows = start, 1
    try:
        yield
    finally:
        _place.start, _place.rows = before


def uniform(like: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24, float32, one for each element of `like`, in its order and shape."""
    _place.drawn = True
    first = like.numel() // _place.rows * _place.start
    blocks = torch.arange(first // 4, (first + like.numel() + 3) // 4, device=like.device)
    words = philox((blocks & WORD, blocks >> 32, _word(_place.step, like), _word(_place.site, like)), seed)
    drawn = torch.stack(words, -1).flatten()[first % 4 :][: like.numel()]
    return ((drawn >> 8).float() * 2.0**-24).view(like.shape)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words for each 128-bit counter, all held in int64; `seed` is the 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # below 2^64: int64 wraps, its bits are right
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _word(value: int, like: Tensor) -> Tensor:
    return torch.tensor(value, device=like.device)
