"""Adaptive block floating point: `abfp(element=int4, n=64, scale=bf16)`, and the analog device that it is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from qsim_core import Format, Quantizer, Scheme, hookimpl
from qsim_core.formats.random_bits import part, uniform
from qsim_core.formats.rounding import divided, working


class ABFP(Scheme):
    """Each vector of n elements along the reduction axis has a scale max|x| / max(element), rounded by `scale`.

    Source: arXiv 2205.06287 (adaptive block floating-point), as arXiv 2307.03712, section III, applies it to
    weights and activations alike. A scale that `scale` rounds down lets the largest element of a block saturate.
    With a second level of scales: `scale=scaled(int8, channel)`; with powers of two: `scale=e8m0`.

    With `adc` products are those of an analog device as arXiv 2205.06287 describes it, see `Device`; weights and
    activations then have the same `n`, `adc`, `gain`, `noise` and `seed`.
    """

    name = "abfp"
    element: Format = Field("int4", description="the number format of the scaled values")  # type: ignore[assignment]
    n: PositiveInt = Field(64, description="elements of a vector that share a scale; the last vector may be short")
    scale: Quantizer | None = Field("bf16", description="what rounds the scales; none: float32")  # type: ignore[assignment]
    adc: int | None = Field(None, ge=2, le=32, description="bits of an analog tile's output; none: no analog device")
    gain: PositiveFloat = Field(1.0, description="amplifies a tile's output before it is digitized")
    noise: NonNegativeFloat = Field(0.0, description="added before it is digitized: uniform, up to so many LSB")
    seed: int = Field(0, ge=0, lt=2**64, description="of the noise")

    @property
    def granularity(self) -> int:
        return self.n

    @property
    def multiplier(self) -> Device | None:
        return None if self.adc is None else Device(self.n, self.adc, self.gain, self.noise, self.seed)

    @model_validator(mode="after")
    def _fits_a_device(self) -> Self:
        if self.adc is None and (self.gain, self.noise, self.seed) != (1, 0, 0):
            raise ValueError("gain, noise and seed are an analog device's; say how many bits its adc has, like adc=8")
        plain = self.symmetric and not self.static and self.rule == "divide"
        rounded = self.scale is None or str(self.scale) == "bf16"
        if self.adc is not None and not (plain and rounded):
            raise ValueError(
                "an analog device has scales max|x| / max(element) in bf16 or not rounded at all; leave adc out"
            )
        return self


@dataclass(frozen=True)
class Device:
    """An analog device that multiplies vectors of n elements, and digitizes each product.

    A tile's codes, in units of their scales, are multiplied and added up as they are. The sum p is amplified and read
    by a converter of `adc` bits, with noise ε uniform in [-noise, noise] in units of its steps:

        y = clamp(round(gain p / step + ε), ±(2^(adc-1) - 1)) step / gain,
        step = n max(element of x) max(element of w) / (2^(adc-1) - 1)

    so that without gain no sum is too large for it. With a gain of g steps are g times as fine, and sums beyond a g-th
    of the largest saturate. y times both scales is added over the tiles in float32. A short last tile
    is read in the same range: the rest of it is idle. Ties go to even; a tile of zeros gives zero.
    """

    n: int
    adc: int
    gain: float
    noise: float
    seed: int

    def __call__(self, left: Tensor, right: Tensor, quantizers: tuple[Quantizer, ...]) -> Tensor:
        """Rows `[..., M, K]` and `[..., N, K]` to `[..., M, N]`."""
        highest = [quantizer.element.max for quantizer in quantizers]  # type: ignore[attr-defined]
        levels = 2 ** (self.adc - 1) - 1
        largest = self.n * highest[0] * highest[1]
        total: Tensor | float = 0.0
        tiles = zip(working(left).split(self.n, -1), working(right).split(self.n, -1), strict=True)
        for place, pair in enumerate(tiles):
            (x, of_x), (w, of_w) = (_in_units(tile, top) for tile, top in zip(pair, highest, strict=True))
            sums = (x @ w.transpose(-1, -2)).double()
            read = sums * (levels * self.gain) / largest  # codes' sums are whole: ties are found exactly
            if self.noise:
                with part(place):
                    read = read + self.noise * (2 * uniform(read, self.seed) - 1)
            found = read.round().clamp(-levels, levels) * (largest / levels / self.gain)
            total = total + found.to(x.dtype) * of_x * of_w.transpose(-1, -2)
        return torch.as_tensor(total).to(left.dtype)

    def __str__(self) -> str:
        noise = f", noise up to {self.noise:g} of its steps" if self.noise else ""
        return f"an analog device (tiles of {self.n}, an ADC of {self.adc} bits, gain {self.gain:g}{noise})"


def _in_units(tile: Tensor, highest: float) -> tuple[Tensor, Tensor]:
    """A tile `[..., n]` in units of its scales, and these `[..., 1]`.

    A scale in bfloat16 is within 2^-9 of max|x| / max(element), and so the largest code of a tile is max(element).
    """
    scale = divided(tile.abs().amax(-1, keepdim=True), highest)
    return tile / torch.where(scale == 0, 1.0, scale), scale


@hookimpl
def qsim_quantizers() -> list[type[Quantizer]]:
    return [ABFP]
