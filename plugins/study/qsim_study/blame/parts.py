"""The parts of a site's error: element, scale, clipping, arithmetic.

The parts are switched on one after the other, and each part is the change of the value that it makes. At first the
values inside the range are rounded to the grid, under scales that are not rounded; those beyond it stay as they are.
Then scales are rounded, then values are clipped, and then the arithmetic is simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsim_core.formats.format import unscaled_format
from qsim_core.formats.quantizer import Granularity, SiteQuantizer
from qsim_core.quantizers.calibrators import AbsMax, MinMax
from qsim_core.quantizers.scheme import Scheme
from qsim_core.sites.site import Site

PARTS = ("element", "scale", "clipping", "arithmetic")
ROLES = ("input", "input2", "weight", "output")


@dataclass(frozen=True, eq=False)
class Unclipped(SiteQuantizer):
    """A quantizer that leaves the values beyond its range as they are."""

    whole: SiteQuantizer

    def quantize(self, x: Tensor) -> Tensor:
        inside, rounded = self.whole.passes(x), self.whole.quantize(x)
        return rounded if inside is None else torch.where(inside, rounded, x)

    @property
    def granularity(self) -> Granularity | None:
        return self.whole.granularity

    @property
    def by_rows(self) -> bool:
        return self.whole.by_rows


def quantizers_of(site: Site) -> list[Any]:
    """The quantizers that a site has, in the order of `ROLES`."""
    roles = (
        role for role in ROLES if role == "output" or role in site.input_roles or (role == "weight" and site.weight)
    )
    return [quantizer for role in roles if (quantizer := site.standing(role)) is not None]


def changes(site: Site) -> bool:
    """True if a site has a quantizer, or an arithmetic that is simulated."""
    return site.plan.arithmetic.simulates or bool(quantizers_of(site))


def steps(quantizer: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a quantizer's error, each with the quantizer once it is switched on; the last is the whole one."""
    yield "element", unclipped(with_exact_scale(quantizer))
    if with_exact_scale(quantizer) is not quantizer:
        yield "scale", unclipped(quantizer)
    if can_clip(quantizer):
        yield "clipping", quantizer


def unsplit(site: Site) -> Iterator[str]:
    """Lines that name what is counted as element at a site, as it cannot be told apart."""
    for quantizer in quantizers_of(site):
        plain = quantizer.plain
        if plain.rounds_to is None:
            yield f"{plain} names no number format: all of its error counts as element"
        elif plain is not quantizer and getattr(plain, "scale", None) is not None:
            yield f"{plain} holds scales that are rounded: the error of the rounding counts as element"


def with_exact_scale(quantizer: Any) -> Any:
    """The scheme with scales that are not rounded; any other quantizer, and a scheme without rounded scales, itself."""
    if isinstance(quantizer, Scheme) and (quantizer.scale is not None or quantizer.rule != "divide"):
        return quantizer.replace(scale=None, rule="divide")
    return quantizer


def can_clip(quantizer: Any) -> bool:
    """False for a scheme whose scale covers every value, and for a format without scales whose range is wide."""
    if isinstance(quantizer, Scheme):
        return not (isinstance(quantizer.range, MinMax | AbsMax) and with_exact_scale(quantizer) is quantizer)
    bare = unscaled_format(quantizer)
    return bare is None or not bare.wide


def unclipped(quantizer: Any) -> Any:
    """The quantizer without clipping; itself if it never clips."""
    return Unclipped(quantizer) if can_clip(quantizer) else quantizer
