"""SINQ: `sinq(scheme)` gives each column of a weight a scale beside those of its blocks, without calibration data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from qsim_core import QsimError, Quantizer, Scheme, hookimpl
from qsim_core.formats.codes import Encoded
from qsim_core.formats.quantizer import Granularity, floating, laid_out_as
from qsim_core.formats.rounding import working

LEAST, MOST = 1e-3, 1e3
"""Bounds of standard deviations."""
SLOWEST, FASTEST = 0.7, 2.0
"""Bounds of the factor by which a scale changes in one pass."""
COLUMN_BITS = 16


@dataclass(frozen=True)
class SinqEncoded(Encoded):
    """Codes and scales of a weight [..., K] whose columns were divided by scales, and the scales of the columns."""

    columns: Tensor | None = None
    """The scales of the columns, float32 [K]. They count 16 bits each."""

    @property
    def bits(self) -> int:
        return super().bits + (0 if self.columns is None else COLUMN_BITS * self.columns.numel())


class Sinq(Quantizer):
    """Divides the columns of a weight by scales, rounds it by a scheme, and multiplies the columns back.

    The columns and rows of each tile, all rows of n columns, get factors that even out their standard deviations σ:

        c = c · clip(σ_column / σ_least, 0.7, 2)        r = r · clip(σ_row / σ_least, 0.7, 2)

    in each pass, on the tile divided by both. σ_least is the smallest of all at the start. The factors with the least
    imbalance, max σ / min σ, are kept. Passes end once it grows. The factors of rows are part of the scheme's own
    scales; those of columns take 16 bits each. Source: SINQ, arXiv 2509.22944, and its authors' code.
    """

    name = "sinq"
    scheme: Scheme = Field("block(int4, n=64, symmetric=false)", description="rounds; its blocks lie along a row")  # type: ignore[assignment]
    steps: PositiveInt = Field(16, description="passes over each tile, at most")

    @model_validator(mode="after")
    def _has_scales_of_rows(self) -> Self:
        if isinstance(self.scheme.granularity, tuple) or self.scheme.granularity == "tensor":
            raise ValueError(f"{self.scheme} shares scales over rows; sinq takes blocks or channels")
        if self.scheme.needs_held_scales("input"):
            raise ValueError(f"{self.scheme} has static or learned scales; sinq finds the scales of a weight anew")
        return self

    def quantize(self, x: Tensor) -> Tensor:
        if floating(x).numel() == 0:
            return x.clone()
        columns = self.columns(x)
        return laid_out_as(x, self.scheme.quantize(working(x) / columns) * columns)

    def encode(self, x: Tensor) -> SinqEncoded:
        """Encode `x` [..., K] by the scheme, after its columns are divided by their scales.

        Raises `QsimError` for a value without a code, and if the scheme has no codes.
        """
        columns = self.columns(x)
        encoded = self.scheme.encode(working(x) / columns)
        parts = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
        return SinqEncoded(**parts | {"dtype": x.dtype, "columns": columns})

    def decode(self, encoded: Encoded) -> Tensor:
        """Compute what the scheme decodes, times the scales of the columns, in the dtype that was encoded.

        Raises `QsimError` if another quantizer encoded it.
        """
        columns: Tensor | None = getattr(encoded, "columns", None)
        if columns is None:
            raise QsimError(f"these codes have no scales of columns, by which {self} would multiply")
        inner = replace(encoded, dtype=columns.dtype)
        return (self.scheme.decode(inner) * columns).to(encoded.dtype)

    def passes(self, x: Tensor) -> Tensor | None:
        return self.scheme.passes(working(x) / self.columns(x))

    def gradient_passes(self, x: Tensor) -> Tensor | None:
        return self.scheme.gradient_passes(working(x) / self.columns(x))

    def columns(self, x: Tensor) -> Tensor:
        """Find the scales of the columns of `x` [..., K]: [K]; ones without elements."""
        if x.numel() == 0:
            return working(x.new_ones(x.shape[-1:]))
        length = x.shape[-1] if x.dim() else 1
        rows = working(x.detach()).reshape(-1, length)
        n = min(self.scheme.granularity, length) if isinstance(self.scheme.granularity, int) else length
        whole = length // n * n
        tiles = [rows[:, :whole].unflatten(1, (-1, n)).transpose(0, 1)]
        if whole < length:
            tiles.append(rows[:, whole:].unsqueeze(0))
        return torch.cat([balanced(tile, self.steps).flatten() for tile in tiles]).view(x.shape[-1:])

    def bits_per_element(self, shape: torch.Size) -> float | None:
        bits = self.scheme.bits_per_element(shape)
        rows = shape[:-1].numel()
        return None if bits is None or not rows else bits + COLUMN_BITS / rows

    @property
    def granularity(self) -> Granularity:
        return self.scheme.granularity

    @property
    def sharing(self) -> frozenset[Granularity]:
        return self.scheme.sharing | {"tensor"}

    @property
    def draws(self) -> bool:
        return self.scheme.draws


def balanced(tiles: Tensor, steps: int) -> Tensor:
    """Find the factors of the columns of tiles [T, rows, n] that even out standard deviations: [T, n]."""
    column, row = torch.zeros_like(tiles[:, :1]), torch.zeros_like(tiles[:, :, :1])  # logarithms of the factors
    if min(tiles.shape[1:]) < 2:  # one value has no standard deviation
        return column.exp()
    deviations = [tiles.std(axis, keepdim=True).clamp(LEAST, MOST) for axis in (1, 2)]
    target = torch.minimum(*(one.amin((1, 2), keepdim=True) for one in deviations)) + 1e-6
    best, least = column, torch.full_like(target, torch.inf)
    grows = torch.zeros_like(target, dtype=torch.bool)
    for _ in range(steps):
        scaled = tiles / column.exp() / row.exp()
        of_columns, of_rows = (scaled.std(axis, keepdim=True) for axis in (1, 2))
        highest = torch.maximum(of_columns.amax((1, 2), keepdim=True), of_rows.amax((1, 2), keepdim=True))
        lowest = torch.minimum(of_columns.amin((1, 2), keepdim=True), of_rows.amin((1, 2), keepdim=True))
        imbalance = highest / lowest.clamp(min=1e-12)
        grows |= imbalance > least
        best, least = torch.where(imbalance <= least, column, best), torch.minimum(least, imbalance)
        column = torch.where(grows, column, _moved(column, of_columns, target))
        row = torch.where(grows, row, _moved(row, of_rows, target))
    return best.exp()


def _moved(factor: Tensor, deviation: Tensor, target: Tensor) -> Tensor:
    """Change logarithms of factors by one pass."""
    change = (deviation.clamp(LEAST, MOST) / target).clamp(SLOWEST, FASTEST).log()
    return (factor + change).clamp(-0.3, 10.0)


@hookimpl
def qsim_quantizers() -> list[type[Quantizer]]:
    return [Sinq]
