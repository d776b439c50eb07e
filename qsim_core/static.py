"""Static scales: found once, in calibration data, and kept at the site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsim_core.errors import DataError
from qsim_core.fused import Scales
from qsim_core.observers import Observer
from qsim_core.quantizer import Granularity, Quantizer, straight_through
from qsim_core.scaling import Scheme

if TYPE_CHECKING:
    from qsim_core.running import Site

SPAN = 1e6
"""Scales of one tensor that lie farther apart than this have collapsed."""
CLIPPED = 0.01
"""More than this share of values outside the range is suspicious."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """A scheme with the scales that its site holds; it stands where the scheme stood."""

    scheme: Scheme
    scale: Tensor
    zero: Tensor | None
    where: str
    """The site and the role, for errors."""

    def quantize(self, x: Tensor) -> Tensor:
        return self.scheme.quantize_at(x, *self._on(x))

    def passes(self, x: Tensor) -> Tensor:
        return self.scheme.passes_at(x, *self._on(x))

    def scales(self, x: Tensor) -> Scales:
        """Scales and zero points of a tensor like `x`, [1, B]."""
        scale, zero = self._on(x)
        return Scales(scale.reshape(1, -1), None if zero is None else zero.reshape(1, -1))

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return straight_through(x, self)  # type: ignore[arg-type]
        return self.quantize(x)

    def bits_per_element(self, shape: torch.Size) -> float | None:
        return self.scheme.bits_per_element(shape)

    @property
    def granularity(self) -> Granularity:
        return self.scheme.granularity

    @property
    def sharing(self) -> frozenset[Granularity]:
        return self.scheme.sharing

    def __str__(self) -> str:
        return str(self.scheme)

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point on the device of `x`. Raises `DataError` if its rows have more or fewer blocks."""
        _check_blocks(self.where, self.scheme, len(self.scale), self.scheme.blocks_of(x.shape))
        return self.scale.to(x.device), None if self.zero is None else self.zero.to(x.device)


def scheme_of(quantizer: Any) -> Any:
    """The scheme of static scales; what is none is itself."""
    return quantizer.scheme if isinstance(quantizer, Fixed) else quantizer


def _check_blocks(where: str, scheme: Scheme, known: int, here: int) -> None:
    if here != known:
        raise DataError(
            f"{where}: {scheme} has static scales for {known} blocks along a row, and here are {here}; where "
            f"lengths differ, blocks along tokens cannot have static scales"
        )


class Fitter:
    """The observer of a calibration run: gathers what passes every site that wants static scales."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], tuple[Site, Scheme, Observer, int]] = {}
        self.batch = 0

    def __call__(self, site: Site, role: str, before: Tensor, after: Tensor, quantizer: Quantizer | None) -> None:
        """Called with every tensor before it is quantized; nothing is, meanwhile. Raises `DataError` on NaN and Inf."""
        scheme = site.planned(role)
        key = site.name, role
        if not isinstance(scheme, Scheme) or not scheme.static or role == "weight":
            return
        if role in site.fixed and key not in self.seen:  # a transform has chosen
            return
        if not before.isfinite().all():
            raise DataError(f"calibration batch {self.batch} brings NaN or Inf to {site.name}; leave it out")
        if key not in self.seen:
            self.seen[key] = site, scheme, scheme.range.observer(), scheme.blocks_of(before.shape)
        _check_blocks(f"{site.name} ({role})", scheme, self.seen[key][3], scheme.blocks_of(before.shape))
        self.seen[key][2].update(*scheme.static_blocks(before))

    def fix(self) -> list[str]:
        """Choose the scales and leave them at the sites; gives a line for each that can hardly be right."""
        suspicions = []
        for (name, role), (site, scheme, observer, _) in self.seen.items():
            values, counts = observer.values()
            fixed = site.fixed[role] = Fixed(scheme, *scheme.fit(values, counts), f"{name} ({role})")
            suspicions += [f"{name} ({role}) {what}" for what in _suspicions(fixed, values, counts)]
        return suspicions


def _suspicions(fixed: Fixed, values: Tensor, counts: Tensor | None) -> Iterator[str]:
    """What is wrong with a scale, for values [B, n] that stand for `counts` each."""
    scale = fixed.scale
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
