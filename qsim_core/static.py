"""Static scales, and those that training starts from: found once, in calibration data, and kept at the site."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qsim_core.errors import DataError, RecipeError
from qsim_core.fixed import Fixed, check_blocks
from qsim_core.learned import hold, of_weight
from qsim_core.observers import Observer
from qsim_core.quantizer import Quantizer
from qsim_core.scaling import Scheme

if TYPE_CHECKING:
    from qsim_core.running import Site

SPAN = 1e6
"""Scales of one tensor that lie farther apart than this have collapsed."""
CLIPPED = 0.01
"""More than this share of values outside the range is suspicious."""


class Fitter:
    """The observer of a calibration run: gathers what passes every site that wants static scales."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], tuple[Site, Scheme, Observer, int]] = {}
        self.weights: dict[str, tuple[Site, Scheme, Tensor, Tensor | None]] = {}
        self.batch = 0

    def __call__(self, site: Site, role: str, before: Tensor, after: Tensor, quantizer: Quantizer | None) -> None:
        """Called with every tensor before it is quantized; nothing is, meanwhile. Raises `DataError` on NaN and Inf."""
        scheme = site.planned(role)
        key = site.name, role
        if not isinstance(scheme, Scheme) or not (scheme.learns or (scheme.static and role != "weight")):
            return
        if role in site.fixed and key not in self.seen:  # a transform has chosen
            return
        if role == "weight":
            self.weights.setdefault(site.name, (site, scheme, *of_weight(scheme, before)))
            return
        if not (scheme.granularity == "tensor" or isinstance(scheme.granularity, int)):
            raise RecipeError(
                f"{site.name} ({role}): {scheme} learns a scale for the tensor or for n along the row, "
                f"not for {scheme.granularity}"
            )
        if not before.isfinite().all():
            raise DataError(f"calibration batch {self.batch} brings NaN or Inf to {site.name}; leave it out")
        if key not in self.seen:
            self.seen[key] = site, scheme, scheme.range.observer(), scheme.blocks_of(before.shape)
        check_blocks(f"{site.name} ({role})", scheme, self.seen[key][3], scheme.blocks_of(before.shape))
        self.seen[key][2].update(*scheme.static_blocks(before))

    def fix(self, model: nn.Module) -> list[str]:
        """Choose the scales and leave them at the model's sites; gives a line for each that can hardly be right."""
        suspicions = []
        for site, scheme, scale, zero in self.weights.values():
            hold(model, site, "weight", scheme, scale, zero)
        for (name, role), (site, scheme, observer, _) in self.seen.items():
            values, counts = observer.values()
            fixed = hold(model, site, role, scheme, *scheme.fit(values, counts))
            suspicions += [f"{name} ({role}) {what}" for what in _suspicions(fixed, values, counts)]
        return suspicions


def _suspicions(fixed: Fixed, values: Tensor, counts: Tensor | None) -> Iterator[str]:
    """What is wrong with a scale, for values [B, n] that stand for `counts` each."""
    scale = fixed.scale.detach()
    if not bool((values != 0).any()):
        yield "saw only zeros in the calibration data"
        return
    positive = scale[scale > 0]
    if len(positive) and float(positive.max() / positive.min()) > SPAN:
        yield f"has scales from {positive.min():.2g} to {positive.max():.2g}"
    if counts is None:
        return
    units = values / torch.where(scale == 0, 1.0, scale)
    inside = fixed.scheme.coded.passes(units if fixed.zero is None else units + fixed.zero)
    clipped = 1 - float((counts * inside).sum() / counts.sum())
    if clipped > CLIPPED:
        yield f"clips {clipped:.1%} of its values"
