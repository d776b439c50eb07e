"""Number formats: a format is the list of the values of its codes.

All else follows from that table, and is written here once: rounding in every mode, the largest value, encoding and
decoding. It is the slow and obvious way. A format that knows a faster one overrides `round`, and is tested against
this one bit for bit.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from qsim_core import fused
from qsim_core.encoding import Encoded, as_codes
from qsim_core.errors import QsimError
from qsim_core.numerics import Rounding, Steps, working
from qsim_core.quantizer import Granularity, Quantizer, floating, laid_out_as
from qsim_core.randomness import uniform

SCALES_SPAN = 2.0**16
"""E4M3 spans 2^17.8, 16-bit integers 2^16."""


class Format(Quantizer):
    """A set of representable values; quantizing rounds to one of them, without any scale. One method to write: `table`.

    Rounding is to the nearest value. A tie goes to the neighbour with the even code (where both are even, to the one
    nearer zero), or as `rounding` says. What is too large saturates, ±Inf too, unless `overflow` says otherwise.
    NaN stays NaN, whether the format has a code for it or not: a simulation must show it. The sign of zero is kept
    where a code has it.
    """

    kind: ClassVar[str] = "format"
    has_nan: ClassVar[bool] = False
    """Whether NaN in the table is a value; else it marks codes without meaning."""

    rounding: Rounding = Field(
        "even", description="to nearest with ties to even or away from zero, toward zero, or stochastic"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of stochastic rounding")

    @abstractmethod
    def table(self) -> Tensor:
        """The value of each code, in the order of codes, float64 [number of codes]; NaN: not a number, or no value."""

    @property
    def overflow(self) -> float | None:
        """What rounding past the largest value gives: Inf, NaN, or None where it saturates."""
        return None

    @property
    def is_integer(self) -> bool:
        """Whether the values are whole numbers, all that lie between the smallest and the largest."""
        return False

    @property
    def steps(self) -> Steps | None:
        """The values as a rule, for ways of rounding to nearest even that have no use for a table; None: no such."""
        return None

    @property
    def native(self) -> torch.dtype | None:
        """torch's dtype that has the same values and is rounded to likewise, ±Inf for what is too large; None: none."""
        return None

    @property
    def powers_of_two(self) -> bool:
        """Whether the values are powers of two, every one from the smallest to the largest."""
        return False

    def full(self) -> Format:
        """The same format with every code in use: what a scale with a zero point takes."""
        return self

    def boundaries(self, values: Tensor) -> Tensor:
        """Where rounding to nearest turns from one of the ascending `values` to the next; halfway, by default."""
        return (values[1:] + values[:-1]) / 2

    def following(self, values: Tensor) -> float:
        """What would come after the largest of the ascending `values` if the codes went on; by default a like step."""
        return float(2 * values[-1] - values[-2])

    @property
    def width(self) -> int:
        """Bits of one code."""
        return grid(self).width

    @functools.cached_property
    def max(self) -> float:
        """The largest finite value."""
        return grid(self).max

    @functools.cached_property
    def min(self) -> float:
        """The lowest finite value."""
        return grid(self).min

    @property
    def reach(self) -> float:
        """What a scale maps the largest magnitude of its block to."""
        return self.max

    @property
    def beyond(self) -> float:
        """The value that would come after `max` if the codes went on; rounding turns to it halfway."""
        return grid(self).beyond

    def round(self, x: Tensor) -> Tensor:
        """`x` (float32 or float64) rounded to the format's values; found by search in the table, in float64."""
        return self.limit(grid(self).nearest(x, self), x)

    def limit(self, rounded: Tensor, x: Tensor) -> Tensor:
        """`rounded`, whose exponents may go past the largest value, brought into range: saturated, or overflown.

        Rounding toward zero overflows for ±Inf only (IEEE 754, 7.4).
        """
        low, high = self.min, self.max
        if self.overflow is None:
            return rounded.clamp(low, high)
        if self.rounding == "zero":
            rounded = torch.where(x.isinf(), x, rounded.clamp(low, high))
        past = torch.where(rounded > high, self.overflow, rounded)
        return torch.where(rounded < low, -self.overflow if low < 0 else low, past)

    def quantize(self, x: Tensor) -> Tensor:
        """`x` rounded without a scale, and back in its own dtype."""
        fast = fused.cast(self, floating(x))
        return laid_out_as(x, self.round(working(x))) if fast is None else fast

    def passes(self, x: Tensor) -> Tensor:
        """True up to half the last step (from `max` to `beyond`) outside of `min` and `max`; NaN does not pass."""
        margin = (self.beyond - self.max) / 2
        return (x <= self.max + margin) & (x >= self.min - margin)

    def encode(self, x: Tensor) -> Encoded:
        """The code of each element's rounded value. Raises `QsimError` for NaN in a format that has none."""
        return Encoded(self.to_codes(self.round(working(floating(x)))), self.width, x.dtype)

    def decode(self, encoded: Encoded) -> Tensor:
        return self.from_codes(encoded.codes, working(torch.empty(0, dtype=encoded.dtype)).dtype).to(encoded.dtype)

    def to_codes(self, values: Tensor) -> Tensor:
        """The codes of values of the format, in their shape. Raises `QsimError` for a value that is none of them."""
        return as_codes(grid(self).codes_of(values, self), self.width)

    def from_codes(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of codes, in their shape."""
        return grid(self).table.to(codes.device)[codes.long()].to(dtype)

    def bits_per_element(self, shape: torch.Size) -> float:
        return float(self.width)

    @property
    def granularity(self) -> Granularity:
        return "element"

    @property
    def by_rows(self) -> bool:
        return True

    @property
    def unscaled(self) -> Format:
        return self

    @property
    def wide(self) -> bool:
        """Whether the positive values span more than 16 binades, enough to be scales as they are."""
        positive = (finite := grid(self).finite)[finite > 0]
        return len(positive) > 0 and float(positive[-1] / positive[0]) > SCALES_SPAN


@dataclass(frozen=True)
class Grid:
    """A format's table put in order."""

    table: Tensor
    finite: Tensor
    """The finite values, ascending, each once: float64."""
    code: Tensor
    """The code of each, the lowest if there are several."""
    negative_zero: int | None
    points: Tensor
    """`finite`, and where the format can overflow the values that would come next on either side."""
    turns: Tensor
    """x <= turns[i] rounds to points[i] or below it; ties are decided by moving a turn down by one ulp."""
    beyond: float

    @property
    def width(self) -> int:
        return max(1, (len(self.table) - 1).bit_length())

    @property
    def max(self) -> float:
        return float(self.finite[-1])

    @property
    def min(self) -> float:
        return float(self.finite[0])

    def nearest(self, x: Tensor, format: Format) -> Tensor:
        """The point that each element rounds to, in the dtype of `x`."""
        wide, points = x.double().contiguous(), self.points.to(x.device)
        if format.rounding == "stochastic":
            index = (torch.bucketize(wide, points, right=True) - 1).clamp(0, len(points) - 2)
            below, above = points[index], points[index + 1]
            y = torch.where(uniform(x, format.seed) < (wide - below) / (above - below), above, below)
        else:
            y = points[torch.bucketize(wide, self.turns.to(x.device))]
        if self.negative_zero is not None:
            y = torch.where(y == 0, torch.copysign(y, wide), y)
        return torch.where(wide.isnan(), wide, y).to(x.dtype)

    def codes_of(self, values: Tensor, format: Format) -> Tensor:
        """The code of each value. Raises `QsimError` for a value that has none."""
        wide, finite, code = values.double().contiguous(), self.finite.to(values.device), self.code.to(values.device)
        index = torch.bucketize(wide, finite).clamp(max=len(finite) - 1)
        codes = code[index]
        if self.negative_zero is not None:
            codes = torch.where((wide == 0) & wide.signbit(), self.negative_zero, codes)
        found = finite[index] == wide
        for special in (torch.inf, -torch.inf, *((torch.nan,) if format.has_nan else ())):
            places = (self.table.isnan() if special != special else self.table == special).nonzero()
            if len(places):
                here = wide.isnan() if special != special else wide == special
                codes, found = torch.where(here, places[0].item(), codes), found | here
        if not found.all():
            raise QsimError(f"{wide[~found][0].item()} has no code in {format}")
        return codes


@functools.lru_cache(maxsize=256)
def grid(format: Format) -> Grid:
    """A format's table in order, made once for each format."""
    table = format.table().double()
    finite, place = torch.sort(table[table.isfinite()], stable=True)
    code = table.isfinite().nonzero().flatten()[place]
    zero = (finite == 0) & finite.signbit()
    negative_zero = int(code[zero][0]) if zero.any() else None
    first = torch.cat([torch.tensor([True]), finite[1:] != finite[:-1]])  # of equal values, that of the lowest code
    finite, code = finite[first], code[first]
    points, parity, beyond = finite, code % 2, format.following(finite)
    if format.overflow is not None:
        above = torch.tensor([beyond], dtype=torch.float64)
        points, parity = torch.cat([points, above]), torch.cat([parity, 1 - parity[-1:]])
        if finite[0] < 0:
            points, parity = torch.cat([-above, points]), torch.cat([1 - parity[:1], parity])
    return Grid(table, finite, code, negative_zero, points, _turns(format, points, parity), beyond)


def _turns(format: Format, points: Tensor, parity: Tensor) -> Tensor:
    """Between each two points, the largest number that rounds to the lower one."""
    low, high = points[:-1], points[1:]
    turns = format.boundaries(points)
    if format.rounding == "zero":
        turns = torch.where(low >= 0, high, torch.where(high <= 0, low, turns))
        up = torch.zeros_like(turns, dtype=torch.bool)
    elif format.rounding == "away":
        up = turns >= 0
    else:
        both_even = (parity[:-1] == 0) & (parity[1:] == 0)
        up = torch.where(both_even, high.abs() < low.abs(), parity[1:] == 0)
    up = (up & (turns > low)) | (turns >= high)  # a value is no tie
    return torch.where(up, torch.nextafter(turns, torch.tensor(-torch.inf, dtype=turns.dtype)), turns)
