"""Schemes with static scales, which a site holds for all data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qsim_core.errors import DataError
from qsim_core.formats.codes import Encoded
from qsim_core.formats.quantizer import Around
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme


@dataclass(frozen=True, eq=False)
class StaticScheme(Around):
    """A scheme with the scales that its site holds. It takes the place of the scheme at the site."""

    scheme: Scheme
    scale: Tensor
    """The scales [..., B, 1]."""
    zero: Tensor | None
    """The zero points in the same shape; None for symmetric scales."""
    where: str
    """The site and the role, for error messages."""

    def quantize(self, x: Tensor) -> Tensor:
        return self.quantize_into(x, None)

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        return self.scheme.quantize_at(x, *self.held_for(x), out=out)

    def encode(self, x: Tensor) -> Encoded:
        """Turn `x` into codes and the scales that are held."""
        return self.scheme.encode_at(self.quantize(x), self.scales(x))

    def decode(self, encoded: Encoded) -> Tensor:
        """Turn codes and scales back into quantized values."""
        return self.scheme.decode(encoded)

    def passes(self, x: Tensor) -> Tensor:
        return self.scheme.passes_at(x, *self.held_for(x))

    def gradient_passes(self, x: Tensor) -> Tensor:
        return self.scheme.passes_at(x, *self.held_for(x), self.scheme.gradient)

    def scales(self, x: Tensor) -> Scales:
        """Give the scales and zero points of a tensor like `x`: [1, B], or [A, B] for each of its rows."""
        return Scales.of(*self.held_for(x))

    @property
    def inner(self) -> Scheme:
        return self.scheme

    @property
    def by_rows(self) -> bool:
        return self.granularity == "tensor" or self.scheme.by_rows

    @property
    def held(self) -> tuple[Tensor, ...]:
        return (self.scale,) if self.zero is None else (self.scale, self.zero)

    @property
    def plain(self) -> Scheme:
        return self.scheme

    def __str__(self) -> str:
        return str(self.scheme)

    def held_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scales and zero points on the device of `x`. Raises `DataError` if `x` has another number of blocks."""
        check_blocks(self.where, self.scheme, self.scale.shape[-2], self.scheme.blocks_of(x.shape))
        return self.scale.to(x.device), None if self.zero is None else self.zero.to(x.device)


def check_blocks(where: str, scheme: Scheme, known: int, here: int) -> None:
    """Raise `DataError` unless a row has as many blocks (`here`) as the scheme has static scales for (`known`)."""
    if here != known:
        raise DataError(
            f"{where}: {scheme} has static scales for {known} blocks along a row, and here are {here}; where "
            f"lengths differ, blocks along tokens cannot have static scales"
        )
