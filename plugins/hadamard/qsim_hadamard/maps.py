"""Invertible maps of the reduction axis: x A in place of an input x, and W A⁻ᵀ in place of a weight W."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from qsim_hadamard.matrices import factors, hadamard, signs


class Map(ABC):
    """An invertible map A of the last axis. The product of an input and a weight stays: (x A)(W A⁻ᵀ)ᵀ = x Wᵀ."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Compute x A, in the dtype of `x`."""

    @abstractmethod
    def of_weight(self, rows: Tensor) -> Tensor:
        """Compute W A⁻ᵀ for rows [..., K] of a weight."""


@dataclass(frozen=True)
class Rotation(Map):
    """x D H along the last axis, of `size`: random signs D from `seed` (none: all +1), then a Hadamard matrix over √n.

    With `block` H is block-diagonal: each `block` neighbouring elements are rotated by themselves.

    H, or a block of it, is a Kronecker product of small Hadamard matrices: Sylvester's, and at most one of Paley's. It
    is applied factor by factor, in the dtype of `x`. Raises `ValueError` for a size that is not such a product.
    """

    size: int
    seed: int | None = 0
    block: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.seed is not None:
            x = x * signs(self.size, self.seed).to(x)
        sizes = factors(self.block or self.size)
        y = x.unflatten(-1, sizes if self.block is None else (-1, *sizes))
        for axis, size in enumerate(sizes, start=y.dim() - len(sizes)):
            matrix = hadamard(size) / math.sqrt(size)
            y = (y.movedim(axis, -1) @ matrix.to(y)).movedim(-1, axis)
        rotated: Tensor = y.reshape(x.shape)
        return rotated

    def of_weight(self, rows: Tensor) -> Tensor:
        """Rotate rows as inputs are: A is orthogonal."""
        return self(rows)

    def __str__(self) -> str:
        return f"a Hadamard matrix of {self.size}" if self.block is None else f"Hadamard matrices of {self.block}"


@functools.lru_cache(maxsize=256)
def rotation(length: int, seed: int | None, size: int) -> Rotation:
    """One object for each kind of rotation, so that q, k and v share the rotated input."""
    return Rotation(length, seed, None if size == length else size)


@dataclass(frozen=True, eq=False)
class Blocks(Map):
    """Any invertible matrices, one for each block of the axis: `forward` [B, n, n] are A, `backward` [B, n, n] A⁻ᵀ."""

    forward: Tensor
    backward: Tensor
    text: str

    def __call__(self, x: Tensor) -> Tensor:
        return _by_block(x, self.forward)

    def of_weight(self, rows: Tensor) -> Tensor:
        return _by_block(rows, self.backward)

    def __str__(self) -> str:
        return self.text


def _by_block(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply each block of the last axis of `x` by its matrix, in the dtype of `x`."""
    blocks = x.unflatten(-1, matrices.shape[:2])
    mapped: Tensor = torch.einsum("...bn,bnm->...bm", blocks, matrices.to(blocks)).flatten(-2)
    return mapped


@dataclass(frozen=True, eq=False)
class Kronecker(Map):
    """x diag(s) (L ⊗ R): a row [m n] is taken as a matrix [m, n], scaled, and becomes Lᵀ X R. All are float64."""

    left: Tensor
    right: Tensor
    scales: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return _on_both_sides(x * self.scales.to(x), self.left, self.right)

    def of_weight(self, rows: Tensor) -> Tensor:
        inverses = (torch.linalg.inv(matrix).T for matrix in (self.left, self.right))
        return _on_both_sides(rows / self.scales.to(rows), *inverses)

    def __str__(self) -> str:
        return f"matrices of {len(self.left)} and {len(self.right)}"


def _on_both_sides(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Lᵀ X R for each row of `x`, in the dtype of `x`."""
    rows = x.unflatten(-1, (len(left), len(right)))
    mapped: Tensor = (left.to(x).T @ rows @ right.to(x)).flatten(-2)
    return mapped


def learnable(length: int, seed: int, size: int) -> Blocks:
    """Rotations by blocks, in float64, that take gradients; they begin as Hadamard matrices with random signs."""
    whole = rotation(length, seed, size)(torch.eye(length, dtype=torch.float64))
    blocks = [whole[start : start + size, start : start + size] for start in range(0, length, size)]
    matrices = torch.stack(blocks).requires_grad_()
    return Blocks(matrices, matrices, f"learned rotations of {size}")
