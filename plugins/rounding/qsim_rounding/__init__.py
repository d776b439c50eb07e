"""Learned rounding: `signround()` and `adaround()` choose the rounding of weights by the outputs of blocks."""

from __future__ import annotations

from qsim_core import Transform, hookimpl
from qsim_rounding.adaround import AdaRound
from qsim_rounding.signround import SignRound


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [SignRound, AdaRound]
