"""Count the significand bits of a quantizer's values: narrower arithmetic is exact if it has as many."""

from __future__ import annotations

from typing import Any

from qsim_core.formats.format import Format, unscaled_format
from qsim_core.quantizers.scheme import Scheme
from qsim_fast import quantizing
from qsim_fast.identity_cache import cached_by_identity

SMALLEST_SAFE = 2.0**-63
"""The product of two values of this magnitude or more is a normal float32."""


@cached_by_identity
def significand_bits(format: Format | None) -> float:
    """Count the bits of a format's significands, the hidden one included; infinite if unknown or not constant."""
    if format is None or format.draws:
        return float("inf")
    if format.powers_of_two:
        return 1
    if not quantizing.follows_its_steps(type(format)):
        return float("inf")
    return format.steps.significand if format.steps is not None else float("inf")


@cached_by_identity
def significand_bits_without_tensor_scale(scheme: Any) -> float:
    """Count the bits of a scheme's values divided by its tensor scale; infinite if it has no tensor scale."""
    if not isinstance(scheme, Scheme) or not quantizing.uses_base_methods(type(scheme)):
        return float("inf")
    scale_scheme = quantizing.scheme_of_scales(scheme)
    if scale_scheme is None or scheme.static or scheme.learns or not quantizing.supported(scheme):
        return float("inf")
    return significand_bits(scheme.element) + significand_bits(scale_scheme.element)


@cached_by_identity
def smallest_magnitude(scheme: Any) -> float:
    """Give a lower bound of the non-zero magnitudes of a scheme's values, divided by its tensor scale if it has one."""
    if isinstance(scheme, Scheme):
        scale_scheme = quantizing.scheme_of_scales(scheme)
        scale_format = scale_scheme.element if scale_scheme is not None else unscaled_format(scheme.scale)
        return 0.0 if scheme.learns else _smallest(scheme.element) * _smallest(scale_format)
    return _smallest(unscaled_format(scheme))


def _smallest(format: Format | None) -> float:
    return 0.0 if format is None or format.steps is None else format.steps.smallest


@cached_by_identity
def significand_bits_of(scheme: Any) -> float:
    """Count the bits of a scheme's values: the element's, plus the scale's unless it is a power of two."""
    if not isinstance(scheme, Scheme):
        return significand_bits(unscaled_format(scheme))
    if not quantizing.uses_base_methods(type(scheme)) or not scheme.symmetric or scheme.learns:
        return float("inf")
    if scheme.scale is None:
        scale: float = 1 if scheme.rule != "divide" else float("inf")
    else:
        scale = significand_bits(unscaled_format(scheme.scale))
    return significand_bits(scheme.element) + (0 if scale == 1 else scale)
