"""How many bits the significands of a quantizer's values have: what narrower arithmetic must hold to be exact."""

from __future__ import annotations

from typing import Any

from qsim_core.formats.format import Format, unscaled_format
from qsim_core.quantizers.scheme import Scheme
from qsim_fast import quantizing
from qsim_fast.identity_cache import remembered

SMALLEST = 2.0**-63
"""Products of values from here on are normal."""


@remembered
def significand(format: Format | None) -> float:
    """Bits of a format's significands, the hidden one counted; infinite where that is not known, or not the same."""
    if format is None or format.draws:
        return float("inf")
    if format.powers_of_two:
        return 1
    if not quantizing.by_steps(type(format)):
        return float("inf")
    return format.steps.significand if format.steps is not None else float("inf")


@remembered
def significand_factored(scheme: Any) -> float:
    """The same of its values without the scale that all of its scales have; infinite where there is none."""
    above = quantizing.above(scheme) if isinstance(scheme, Scheme) and quantizing.as_written(type(scheme)) else None
    if above is None or scheme.static or scheme.learns or not quantizing.plain(scheme):
        return float("inf")
    return significand(scheme.element) + significand(above.element)


@remembered
def smallest_of(scheme: Any) -> float:
    """A bound from below for the magnitudes of its values (less a scale that all scales have) that are not zero."""
    if isinstance(scheme, Scheme):
        above = quantizing.above(scheme)
        bare = above.element if above is not None else unscaled_format(scheme.scale)
        return 0.0 if scheme.learns else _smallest(scheme.element) * _smallest(bare)
    return _smallest(unscaled_format(scheme))


def _smallest(format: Format | None) -> float:
    return 0.0 if format is None or format.steps is None else format.steps.smallest


@remembered
def significand_of(scheme: Any) -> float:
    """The same of a scheme's values: those of an element, times a scale's where that is no power of two."""
    if not isinstance(scheme, Scheme):
        return significand(unscaled_format(scheme))
    if not quantizing.as_written(type(scheme)) or not scheme.symmetric or scheme.learns:
        return float("inf")
    if scheme.scale is None:
        scale: float = 1 if scheme.rule != "divide" else float("inf")
    else:
        scale = significand(unscaled_format(scheme.scale))
    return significand(scheme.element) + (0 if scale == 1 else scale)
