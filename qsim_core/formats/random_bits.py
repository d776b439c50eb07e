"""Random numbers that depend only on the place where they are used.

Stochastic rounding draws from Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011, section 3.3). A number is a function of a seed, a site, a step and the element's index.
So a tensor is rounded to the same bits on any device and by any number of threads. No global state is changed.
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


class Place:
    """A place for which random numbers are drawn, by this thread inside a block."""

    def __init__(self, site: str = "", step: int = 0, start: int = 0, rows: int = 1) -> None:
        self.site, self.step = site, step
        self.start = start
        """The first row, for a tensor that is rounded in parts."""
        self.rows = rows
        """The rows of one part."""
        self.drawn = False
        """True if a number was drawn at this place."""

    def __enter__(self) -> Place:
        self._before, _here.place = _here.place, self
        return self

    def __exit__(self, *error: object) -> None:
        _here.place = self._before


class _Here(threading.local):
    def __init__(self) -> None:
        self.place = Place()


_here = _Here()


def at(site: str = "", step: int = 0, start: int = 0, rows: int = 1) -> Place:
    """Draw the numbers of a site (any name; its CRC-32 is used) and a step (a count from 0) inside the block.

    For a tensor that is rounded in parts, the part has `rows` rows from row `start` on.
    """
    return Place(site, step, start, rows)


@contextlib.contextmanager
def part(start: int) -> Iterator[None]:
    """Draw the numbers of the `start`-th tensor, of many tensors of one shape at one place, inside the block."""
    place = _here.place
    before = place.start, place.rows
    place.start, place.rows = start, 1
    try:
        yield
    finally:
        place.start, place.rows = before


def uniform(like: Tensor, seed: int) -> Tensor:
    """Draw a number in [0, 1) for each element of `like`, in its order and shape: float32, a multiple of 2^-24."""
    place, (step, site) = _here.place, drawn_at()
    first = like.numel() // place.rows * place.start
    blocks = torch.arange(first // 4, (first + like.numel() + 3) // 4, device=like.device)
    words = philox((blocks & WORD, blocks >> 32, _word(step, like), _word(site, like)), seed)
    drawn = torch.stack(words, -1).flatten()[first % 4 :][: like.numel()]
    return ((drawn >> 8).float() * 2.0**-24).view(like.shape)


def drawn_at() -> tuple[int, int]:
    """Give the words of the counter that name the step and the site, and note that a number is drawn there."""
    place = _here.place
    place.drawn = True
    return place.step & WORD, zlib.crc32(place.site.encode())


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10: four 32-bit words for each 128-bit counter, all in int64; `seed` is the 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # below 2^64: int64 wraps around, but the bits are right
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _word(value: int, like: Tensor) -> Tensor:
    return torch.tensor(value, device=like.device)
