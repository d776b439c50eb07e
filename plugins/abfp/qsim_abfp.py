"""Adaptive block floating point: `abfp(element=int4, n=64, scale=bf16)`, and the analog device that it is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from qsim_core import Arithmetic, Format, Quantizer, RecipeError, Scheme, hookimpl
from qsim_core.formats.random_bits import part, uniform
from qsim_core.sites.arithmetic import QuantizedRows


class ABFP(Scheme):
    """Each vector of n elements along the reduction axis has a scale max|x| / max(element), rounded by `scale`.

    Source: arXiv 2205.06287 (adaptive block floating-point), as arXiv 2307.03712, section III, applies it to
    weights and activations alike. A scale that `scale` rounds down lets the largest element of a block saturate.
    With a second level of scales: `scale=scaled(int8, channel)`; with powers of two: `scale=e8m0`.

    The arithmetic `analog` computes products of such vectors as an analog device does.
    """

    name = "abfp"
    removed: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("adc", "gain", "noise", "seed"),
        "the analog device is an arithmetic of its own: beside abfp say arithmetic: analog(adc=8, gain=4, noise=0.5)",
    )
    element: Format = Field("int4", description="the number format of the scaled values")  # type: ignore[assignment]
    n: PositiveInt = Field(64, description="elements of a vector that share a scale; the last vector may be short")
    scale: Quantizer | None = Field("bf16", description="what rounds the scales; none: float32")  # type: ignore[assignment]

    @property
    def granularity(self) -> int:
        return self.n


class Analog(Arithmetic):
    """An analog device that multiplies vectors of n elements, and digitizes each product.

    A tile's codes, in units of their scales, are multiplied and added up as they are. The sum p is amplified and read
    by a converter of `adc` bits, with noise ε uniform in [-noise, noise] in units of its steps:

        y = clamp(round(gain p / step + ε), ±(2^(adc-1) - 1)) step / gain,
        step = n max(element of x) max(element of w) / (2^(adc-1) - 1)

    Without gain no sum is too large for it. With a gain of g steps are g times as fine, and sums beyond a g-th of the
    largest saturate. y times both scales is added over the tiles in float32. A short last tile is read in the same
    range. Ties go to even; a tile of zeros gives zero.

    Both operands are `abfp` with one n, and scales in bf16 or not rounded at all. Source: arXiv 2205.06287.
    """

    name = "analog"
    adc: int = Field(8, ge=2, le=32, description="bits of a tile's digitized output")
    gain: PositiveFloat = Field(1.0, description="amplifies a tile's output before it is digitized")
    noise: NonNegativeFloat = Field(0.0, description="added before it is digitized: uniform, up to so many LSB")
    seed: int = Field(0, ge=0, lt=2**63, description="of the noise")

    def check(self, quantizers: Sequence[Any]) -> None:
        """Raise `RecipeError` unless both operands are `abfp` with the same n and scales that a device has."""
        for quantizer in quantizers:
            if not isinstance(quantizer, ABFP):
                raise RecipeError("it takes abfp on both operands")
            anew = not quantizer.needs_held_scales("input")
            if not (quantizer.symmetric and anew and quantizer.rule == "divide"):
                raise RecipeError("it takes scales max|x| / max(element), found anew for each tensor")
            if quantizer.scale is not None and not _is_bfloat16(quantizer.scale):
                raise RecipeError("it takes scales in bf16, or not rounded at all")
        if len({quantizer.n for quantizer in quantizers}) > 1:
            raise RecipeError("it takes vectors of one length n")

    def multiply(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        """Multiply rows `[..., M, K]` and `[..., N, K]` to `[..., M, N]`, tile by tile."""
        levels = 2 ** (self.adc - 1) - 1
        largest = cast(ABFP, left.quantizer).n * left.element.max * right.element.max
        adding = torch.float64 if largest > 2**24 else torch.float32  # sums of codes are whole, and exact
        total: Tensor | float = 0.0
        for place, (x, w) in enumerate(left.blocks_with(right)):
            sums = (x.units.to(adding) @ w.units.to(adding).transpose(-1, -2)).double()
            read = sums * (levels * self.gain) / largest
            if self.noise:
                with part(place):
                    read = read + self.noise * (2 * uniform(read, self.seed) - 1)
            found = read.round().clamp(-levels, levels) * (largest / levels / self.gain)
            total = total + found.to(x.scale.dtype) * x.scale * w.scale.transpose(-1, -2)
        return torch.as_tensor(total).to(left.values.dtype)


def _is_bfloat16(scale: Quantizer) -> bool:
    """Tell if scales are rounded to bfloat16 and no more."""
    bare = scale.unscaled
    return isinstance(bare, Format) and bare.native is torch.bfloat16 and bare.rounding == "even"


@hookimpl
def qsim_quantizers() -> list[type[Quantizer]]:
    return [ABFP]


@hookimpl
def qsim_arithmetics() -> list[type[Arithmetic]]:
    return [Analog]
