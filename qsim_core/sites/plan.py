"""The quantizers of one matmul, as a recipe plans them."""

from __future__ import annotations

from dataclasses import dataclass

from qsim_core.formats.quantizer import Quantizer


@dataclass(frozen=True)
class Plan:
    """The quantizers of one matmul's sites; `skipped` if the recipe says to leave the matmul alone."""

    weight: Quantizer | None = None
    input: Quantizer | None = None
    output: Quantizer | None = None
    skipped: bool = False
