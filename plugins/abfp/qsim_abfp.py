"""Adaptive block floating point: `abfp(element=int4, n=64, scale=bf16)`."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from qsim_core import Format, Quantizer, Scheme, hookimpl


class ABFP(Scheme):
    """Each vector of n elements along the reduction axis has a scale max|x| / max(element), rounded by `scale`.

    Source: arXiv 2205.06287 (adaptive block floating-point), as arXiv 2307.03712, section III, applies it to
    weights and activations alike. A scale that `scale` rounds down lets the largest element of a block saturate.
    With a second level of scales: `scale=scaled(int8, channel)`; with powers of two: `scale=e8m0`.
    """

    name = "abfp"
    element: Format = Field("int4", description="the number format of the scaled values")  # type: ignore[assignment]
    n: PositiveInt = Field(64, description="elements of a vector that share a scale; the last vector may be short")
    scale: Quantizer | None = Field("bf16", description="what rounds the scales; none: float32")  # type: ignore[assignment]

    @property
    def granularity(self) -> int:
        return self.n


@hookimpl
def qsim_quantizers() -> list[type[Quantizer]]:
    return [ABFP]
