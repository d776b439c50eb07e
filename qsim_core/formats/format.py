"""Number formats: a format is the list of the values of its codes.

All else follows from that table, and is written here once: rounding in every mode, the largest value, encoding and
decoding. It is the slow and obvious way. A format that knows a faster one overrides `round`, and is tested against
this one bit for bit.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from qsim_core.errors import QsimError
from qsim_core.formats.accelerator import accelerated
from qsim_core.formats.codes import Encoded, as_codes
from qsim_core.formats.quantizer import Granularity, Quantizer, floating, laid_out_as
from qsim_core.formats.rounding import Rounding, Steps, working
from qsim_core.formats.table import OrderedTable

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
        return table_of(self).width

    @functools.cached_property
    def max(self) -> float:
        """The largest finite value."""
        return table_of(self).max

    @functools.cached_property
    def min(self) -> float:
        """The lowest finite value."""
        return table_of(self).min

    @property
    def reach(self) -> float:
        """What a scale maps the largest magnitude of its block to."""
        return self.max

    @property
    def beyond(self) -> float:
        """The value that would come after `max` if the codes went on; rounding turns to it halfway."""
        return table_of(self).beyond

    def round(self, x: Tensor) -> Tensor:
        """`x` (float32 or float64) rounded to the format's values; found by search in the table, in float64."""
        return self.limit(table_of(self).nearest(x, self.rounding, self.seed), x)

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
        """Round `x` without a scale, and give it back in its own dtype."""
        return Format.quantize_into(self, x, None)

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        if type(self).quantize is not Format.quantize and out is not None:  # a class with a way of its own
            return self.quantize(x)
        fast = accelerated(self, floating(x), out=out)
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
        return as_codes(_codes(self, values), self.width)

    def from_codes(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of codes, in their shape."""
        return table_of(self).table.to(codes.device)[codes.long()].to(dtype)

    def bits_per_element(self, shape: torch.Size) -> float:
        return float(self.width)

    @property
    def granularity(self) -> Granularity:
        return "element"

    @property
    def by_rows(self) -> bool:
        return True

    @property
    def draws(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def unscaled(self) -> Format:
        return self

    @property
    def wide(self) -> bool:
        """Whether the positive values span more than 16 binades, enough to be scales as they are."""
        positive = (finite := table_of(self).finite)[finite > 0]
        return len(positive) > 0 and float(positive[-1] / positive[0]) > SCALES_SPAN


@functools.lru_cache(maxsize=256)
def table_of(format: Format) -> OrderedTable:
    """A format's table in order, made once for each format."""
    return OrderedTable.of(format.table(), format.boundaries, format.following, format.overflow, format.rounding)


def unscaled_format(quantizer: Any) -> Format | None:
    """The number format that a quantizer rounds to as it is, if it does nothing else."""
    found = quantizer.unscaled if isinstance(quantizer, Quantizer) else None
    return found if isinstance(found, Format) else None


def _codes(format: Format, values: Tensor) -> Tensor:
    """The code of each value. Raises `QsimError` for a value that has none."""
    codes, missing = table_of(format).codes_of(values, format.has_nan)
    if missing is not None:
        raise QsimError(f"{missing} has no code in {format}")
    return codes
