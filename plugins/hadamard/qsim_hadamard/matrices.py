"""Hadamard matrices of known sizes, and random signs."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LARGEST = 64
"""Factors of a rotation are at most so large, or one of Paley's: cheaper than one product with the whole of it."""


@functools.lru_cache(maxsize=64)
def signs(size: int, seed: int) -> Tensor:
    """Random signs [size], the same for the same seed everywhere; torch's global generator is left alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator).mul(2).sub(1).double()


@functools.lru_cache(maxsize=64)
def factors(size: int) -> tuple[int, ...]:
    """Sizes of Hadamard matrices whose Kronecker product has this size, none larger than need be."""
    two = size & -size
    found: list[int] = []
    if size > two:  # an odd factor m: one of Paley's, of m times a power of two
        odd = size // two
        multiple = next((4 * odd << k for k in range(8) if 4 << k <= two and _paley(4 * odd << k)), None)
        if multiple is None:
            raise ValueError(f"no Hadamard matrix of {size} is known here")
        found, two = [multiple], size // multiple
    while two > LARGEST:
        found, two = [*found, LARGEST], two // LARGEST
    return (*found, two) if two > 1 or not found else tuple(found)


@functools.lru_cache(maxsize=64)
def hadamard(size: int) -> Tensor:
    """A Hadamard matrix [size, size] of ±1, float64: H Hᵀ = size · I.

    Sylvester's for powers of two; else Paley's: size - 1 a prime that leaves 3 when divided by 4, or size / 2 - 1 one
    that leaves 1 (R. Paley, On orthogonal matrices, 1933, constructions I and II).
    """
    if size & (size - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
        return matrix
    kind = _paley(size)
    order = size if kind == 1 else size // 2
    core = torch.zeros(order, order, dtype=torch.float64)
    core[0, 1:], core[1:, 0] = 1.0, -1.0 if kind == 1 else 1.0
    core[1:, 1:] = _jacobsthal(order - 1)
    if kind == 1:
        return core + torch.eye(order, dtype=torch.float64)
    of_edges = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    of_diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, of_edges) + torch.kron(torch.eye(order, dtype=torch.float64), of_diagonal)


def _paley(size: int) -> int | None:
    """The number of Paley's construction that makes a matrix of this size, with a prime; None: neither does."""
    if size % 4 == 0 and _is_prime(size - 1):
        return 1
    return 2 if size % 4 == 0 and (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1) else None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _jacobsthal(prime: int) -> Tensor:
    """The matrix of column - row modulo the prime: 1 for a square, -1 for another number, 0 for zero."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1.0
    character[0] = 0.0
    places = torch.arange(prime)
    return character[(places[None, :] - places[:, None]) % prime]


def unknown(size: int) -> str | None:
    """The reason why there is no Hadamard matrix of a size; None: there is one."""
    try:
        factors(size)
    except ValueError as error:
        return str(error)
    return None
