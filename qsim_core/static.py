"""Static scales: found once, in calibration data, and kept at the site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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


Place = tuple[str, str]
"""A site's name and a role."""
Statistics = dict[Place, tuple[Tensor, Tensor | None]]
"""What stands for all that has passed each place: values [B, n], and how many each stands for."""
Wanted = dict[tuple[str, str, str], Observer]
"""A site's name, a role, and which elements share a scale -> what is to gather it."""


class Fitter:
    """The observer of a calibration run: gathers what passes every site that wants static scales."""

    def __init__(self) -> None:
        self.seen: dict[Place, tuple[Scheme, Observer, int]] = {}
        self.batch = 0

    def __call__(self, site: Site, role: str, before: Tensor, after: Tensor, quantizer: Quantizer | None) -> None:
        """Called with every tensor before it is quantized; nothing is, meanwhile. Raises `DataError` on NaN and Inf."""
        scheme, key = _wants(site, role), (site.name, role)
        if scheme is None:
            return
        if not before.isfinite().all():
            raise DataError(f"calibration batch {self.batch} brings NaN or Inf to {site.name}; leave it out")
        if key not in self.seen:
            self.seen[key] = scheme, scheme.range.observer(), scheme.blocks_of(before.shape)
        _check_blocks(f"{site.name} ({role})", scheme, self.seen[key][2], scheme.blocks_of(before.shape))
        self.seen[key][1].update(*scheme.static_blocks(before))

    def statistics(self) -> Statistics:
        """What was gathered at each place."""
        return {key: observer.values() for key, (_, observer, _) in self.seen.items()}


def wanted(sites: Iterable[Site]) -> Wanted:
    """Where static scales are still to be found, by which scheme shares them, and an observer that has seen nothing."""
    found = ((site, role, _wants(site, role)) for site in sites for role in ("input", "input2", "output"))
    return {
        (site.name, role, repr(scheme.granularity)): scheme.range.observer()
        for site, role, scheme in found
        if scheme is not None
    }


def fix(sites: Mapping[str, Site], statistics: Statistics) -> list[str]:
    """Choose the scales and leave them at the sites; gives a line for each that can hardly be right."""
    suspicions = []
    for (name, role), (values, counts) in statistics.items():
        site, where = sites[name], f"{name} ({role})"
        scheme = _wants(site, role)
        assert scheme is not None
        fixed = site.fixed[role] = Fixed(scheme, *scheme.fit(values, counts), where)
        suspicions += [f"{where} {what}" for what in _suspicions(fixed, values, counts)]
    return suspicions


def _wants(site: Site, role: str) -> Scheme | None:
    """The scheme whose static scales are to be found; None where there is none, or a transform has chosen them."""
    scheme = site.planned(role)
    static = isinstance(scheme, Scheme) and scheme.static and role != "weight" and role not in site.fixed
    return scheme if static else None  # type: ignore[return-value]


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
