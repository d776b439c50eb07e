"""A scheme with scales that its site holds, or whose tensor is there in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsim_core.errors import DataError
from qsim_core.fast import fused
from qsim_core.formats.quantizer import Granularity, laid_out_as, straight_through
from qsim_core.formats.rounding import working
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme


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

    def gradient_passes(self, x: Tensor) -> Tensor:
        return self.scheme.passes_at(x, *self._on(x), self.scheme.gradient)

    def scales(self, x: Tensor) -> Scales:
        """Scales and zero points of a tensor like `x`: [1, B], or [A, B] for each of its rows."""
        return Scales.of(*self._on(x))

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
        check_blocks(self.where, self.scheme, self.scale.shape[-2], self.scheme.blocks_of(x.shape))
        return self.scale.to(x.device), None if self.zero is None else self.zero.to(x.device)


@dataclass(frozen=True, eq=False)
class Within:
    """A scheme on part of a tensor: what all of it shares follows from the highest magnitude there, which is known."""

    scheme: Scheme
    highest: Tensor
    """A number."""

    @staticmethod
    def fits(scheme: Any) -> bool:
        """Whether one scale, of the whole tensor or of its scales, is all that depends on the other parts."""
        if not isinstance(scheme, Scheme) or scheme.static or scheme.learns or not scheme.symmetric:
            return False
        if not fused.plain(scheme):
            return False
        if scheme.granularity == "tensor":
            return scheme.scale is None or scheme.scale.granularity == "element"
        return fused.above(scheme) is not None

    def quantize(self, x: Tensor) -> Tensor:
        """What `scheme.quantize` makes of this part of the whole."""
        scheme, highest = self.scheme, self.highest.to(working(x).dtype)
        if scheme.granularity == "tensor":
            exact, _ = scheme._covering(-highest, highest)
            return scheme.quantize_at(x, scheme._rounded(exact).view(1, 1), None)
        above = fused.above(scheme)
        assert above is not None
        second = fused.scale_of_scales(scheme, highest)
        if (fast := fused.quantize(scheme, x, second=second)) is not None:
            return fast
        blocks, own, _ = scheme._measured(x)
        scale = above.quantize_at(own, second.view(1, 1), None).unsqueeze(-1)
        return laid_out_as(x, scheme.join(scheme.round_at(blocks, scale, None), x))

    __call__ = quantize


def scheme_of(quantizer: Any) -> Any:
    """The scheme of static scales; what is none is itself."""
    return quantizer.scheme if isinstance(quantizer, Fixed) else quantizer


def check_blocks(where: str, scheme: Scheme, known: int, here: int) -> None:
    """Raise `DataError` unless rows have as many blocks as there are scales for."""
    if here != known:
        raise DataError(
            f"{where}: {scheme} has static scales for {known} blocks along a row, and here are {here}; where "
            f"lengths differ, blocks along tokens cannot have static scales"
        )
