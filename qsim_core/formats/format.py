"""Number formats: a format is the list of the values of its codes.

All else follows from this table, and is written here once: rounding in every mode, the largest value, encoding and
decoding. This code is slow and obvious. A format with a faster way overrides `round`, and is tested against this code
bit for bit.
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
from qsim_core.formats.rounding import Rounding, Steps, working, working_dtype
from qsim_core.formats.table import OrderedTable

SCALES_SPAN = 2.0**16
"""The ratio of the largest to the smallest positive value that a format of scales has to exceed.

E4M3 spans 2^17.8, 16-bit integers 2^16."""


class Format(Quantizer):
    """A set of representable values; quantizing rounds to one of them, without a scale. One method to write: `table`.

    Rounding is to the nearest value by default. A tie then goes to the neighbour with the even code; of two even codes,
    to the value nearer zero. `rounding` chooses another mode. A value that is too large saturates, ±Inf too, unless the
    format has an `overflow`. NaN stays NaN even if the format has no code for it, so that a simulation shows it. The
    sign of zero is kept if the format has a code for -0.
    """

    kind: ClassVar[str] = "format"
    has_nan: ClassVar[bool] = False
    """True if NaN in the table is a value of the format; otherwise NaN marks a code without a value."""

    rounding: Rounding = Field(
        "even", description="to nearest with ties to even or away from zero, toward zero, or stochastic"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of stochastic rounding")

    @abstractmethod
    def table(self) -> Tensor:
        """The value of each code in the order of codes, float64 [number of codes]; see `has_nan` for NaN."""

    @property
    def overflow(self) -> float | None:
        """The result of rounding past the largest value: Inf or NaN; None if it saturates."""
        return None

    @property
    def is_integer(self) -> bool:
        """True if the values are all the whole numbers from the smallest to the largest."""
        return False

    @property
    def steps(self) -> Steps | None:
        """The values as a rule, for code that rounds to nearest even without the table; None if there is no rule."""
        return None

    @property
    def native(self) -> torch.dtype | None:
        """The torch dtype with the same values, to which torch rounds in the same way; None if there is none.

        A value that is too large becomes ±Inf in it.
        """
        return None

    @property
    def powers_of_two(self) -> bool:
        """True if the values are all the powers of two from the smallest to the largest."""
        return False

    def full(self) -> Format:
        """The same format with every code in use, which a scheme with a zero point rounds to."""
        return self

    def boundaries(self, values: Tensor) -> Tensor:
        """The boundaries of rounding to nearest between neighbours of the ascending `values` [n]: [n - 1].

        By default a boundary is halfway between its neighbours.
        """
        return (values[1:] + values[:-1]) / 2

    def following(self, values: Tensor) -> float:
        """The value that would follow the largest of the ascending `values`; by default the last step is repeated."""
        return float(2 * values[-1] - values[-2])

    @property
    def width(self) -> int:
        """The number of bits of one code."""
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
        """The value to which a scale maps the largest magnitude of its block; by default the largest value."""
        return self.max

    @property
    def beyond(self) -> float:
        """The value that would follow `max` if there were more codes; rounding to nearest turns to it halfway."""
        return table_of(self).beyond

    def round(self, x: Tensor) -> Tensor:
        """Round `x` (float32 or float64) to values of the format, by a search in the table in float64."""
        return self.limit(table_of(self).nearest(x, self.rounding, self.seed), x)

    def limit(self, rounded: Tensor, x: Tensor) -> Tensor:
        """Saturate or overflow the values of `rounded` that lie past the largest or the lowest value.

        `rounded` is `x`, rounded as if the format had more exponents. Rounding toward zero overflows for ±Inf only
        (IEEE 754, section 7.4).
        """
        low, high = self.min, self.max
        if self.overflow is None:
            return rounded.clamp(low, high)
        if self.rounding == "zero":
            rounded = torch.where(x.isinf(), x, rounded.clamp(low, high))
        past = torch.where(rounded > high, self.overflow, rounded)
        return torch.where(rounded < low, -self.overflow if low < 0 else low, past)

    def quantize(self, x: Tensor) -> Tensor:
        """Round `x` without a scale; the result has the dtype of `x`."""
        return Format.quantize_into(self, x, None)

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        if type(self).quantize is not Format.quantize and out is not None:  # a subclass overrides `quantize` alone
            return self.quantize(x)
        fast = accelerated(self, floating(x), out=out)
        return laid_out_as(x, self.round(working(x))) if fast is None else fast

    def passes(self, x: Tensor) -> Tensor:
        """True from `min` to `max`, and up to half a step outside: half of `beyond` - `max`. False for NaN."""
        margin = (self.beyond - self.max) / 2
        x = working(x)
        return (x >= self.min - margin) & (x <= self.max + margin)

    def encode(self, x: Tensor) -> Encoded:
        """Encode the rounded value of each element. Raises `QsimError` for NaN in a format without NaN."""
        return Encoded(self.to_codes(self.round(working(floating(x)))), self.width, x.dtype)

    def decode(self, encoded: Encoded) -> Tensor:
        return self.from_codes(encoded.codes, working_dtype(encoded.dtype)).to(encoded.dtype)

    def to_codes(self, values: Tensor) -> Tensor:
        """The codes of values of the format, in the same shape. Raises `QsimError` for a value that has no code."""
        return as_codes(_codes(self, values), self.width)

    def from_codes(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of codes, in the same shape."""
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
        """True if the positive values span more than 16 binades: then the format can round scales by itself."""
        finite = table_of(self).finite
        positive = finite[finite > 0]
        return len(positive) > 0 and float(positive[-1] / positive[0]) > SCALES_SPAN


@functools.lru_cache(maxsize=256)
def table_of(format: Format) -> OrderedTable:
    """The ordered table of a format, made once for each format."""
    return OrderedTable.of(format.table(), format.boundaries, format.following, format.overflow, format.rounding)


def unscaled_format(quantizer: Any) -> Format | None:
    """The number format that a quantizer rounds to without a scale; None for any other quantizer, and for None."""
    found = quantizer.unscaled if isinstance(quantizer, Quantizer) else None
    return found if isinstance(found, Format) else None


def _codes(format: Format, values: Tensor) -> Tensor:
    """The code of each value. Raises `QsimError` for a value that has none."""
    codes, missing = table_of(format).codes_of(values, format.has_nan)
    if missing is not None:
        raise QsimError(f"{missing} has no code in {format}")
    return codes
