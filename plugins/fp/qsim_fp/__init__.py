"""Floating point: `float(exponent, mantissa)` of any split and convention, IEEE P3109, and formats that have names."""

from __future__ import annotations

import functools
import math
import re
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from qsim_core import Format, Preset, hookimpl
from qsim_core.formats.rounding import Steps, power_of_two
from qsim_fp.rounding import round_to_float

NATIVE = {(8, 7): torch.bfloat16, (5, 10): torch.float16}
"""IEEE formats, as (exponent, mantissa): torch converts float32 to them as `round_to_float` does, but faster."""
MOST_BITS = 15
"""The width of the widest format of P3109 here."""
EXPONENT_BITS = 8
"""The exponent bits with which the values of a P3109 format lie in float32's range."""
SMALLEST_EXPONENT = -149
"""Exponent of float32's smallest subnormal: float32 cannot simulate values below it."""


class Float(Format):
    """One sign bit (or none), `exponent` and `mantissa` bits, subnormals; rounded to nearest, ties to even.

    `specials` names the usual bias and the codes that are Inf or NaN:

        ieee   2^(e-1) - 1  topmost exponent: Inf and NaN (IEEE 754, OCP E5M2)
        fn     2^(e-1) - 1  topmost code: NaN (OCP 8-bit FP v1.0, 5: E4M3)
        none   2^(e-1) - 1  every code is a number (OCP MX v1.0, 5.3: FP6, FP4)
        fnuz   2^(e-1)      code of -0: NaN (arXiv 2206.02915; P3109 finite)
        p3109  2^(e-1)      code of -0: NaN, topmost: Inf (IEEE P3109 extended)

    Unsigned `p3109` has NaN in the topmost code and Inf below it. A value beyond the largest finite one, ±Inf too,
    saturates if the format has no Inf, and becomes Inf if it has. `saturate` changes this: true always saturates;
    with false, `fn` and `fnuz` give NaN. Without subnormals the codes of exponent 0 are zero. NaN always stays NaN.

    A scale maps the largest magnitude of its block to `full_scale`. Values up to the largest one lie above it.
    """

    name = "float"
    exponent: int = Field(ge=1, le=8, description="exponent bits")
    mantissa: int = Field(ge=0, le=17, description="stored fraction bits")
    specials: Literal["ieee", "fn", "fnuz", "p3109", "none"] = Field("none", description="which codes are Inf and NaN")
    bias: int | None = Field(None, ge=-512, description="bias of the exponent; none: the usual bias")
    subnormals: bool = Field(True, description="false: no values between zero and the smallest normal value")
    signed: bool = Field(True, description="false: values start at 0, and the code has one bit less")
    saturate: bool | None = Field(None, description="clamp values that are too large; none: only if there is no Inf")
    full_scale: float | None = Field(
        None, gt=0, description="the value to which a scale maps the largest magnitude; none: the largest value"
    )

    @model_validator(mode="after")
    def _leaves_numbers(self) -> Self:
        bits = self.signed + self.exponent + self.mantissa
        if bits > 19:
            raise ValueError(f"a float has at most 19 bits, not {int(self.signed)} + {self.exponent} + {self.mantissa}")
        if bits < 2:
            raise ValueError("a float has at least 2 bits, not 1")
        if self.specials == "ieee" and self.exponent < 2:
            raise ValueError("with ieee specials and one exponent bit every value would be subnormal or Inf")
        if self.specials == "fnuz" and not self.signed:
            raise ValueError("fnuz gives the code of -0 to NaN, but an unsigned format has no -0; write specials=fn")
        if self.specials == "none" and self.saturate is False:
            raise ValueError("a format without Inf and NaN always saturates; leave saturate=false out")
        finite = (table := self.table())[table.isfinite() & (table > 0)]
        if not len(finite):
            raise ValueError(f"with {self.specials} specials zero is the only value left")
        if finite.max() > torch.finfo(torch.float32).max:
            remedy = "8 exponent bits need specials=ieee" if self.bias is None else "raise the bias"
            raise ValueError(f"its largest value {finite.max():.2g} is beyond float32's; {remedy}")
        if finite.min() < 2.0**SMALLEST_EXPONENT:
            raise ValueError(f"its smallest value {finite.min():.2g} is below float32's; lower the bias")
        if self.full_scale is not None and self.full_scale > finite.max():
            raise ValueError(f"full_scale is at most the largest value, {finite.max():g}, not {self.full_scale:g}")
        return self

    @property
    def offset(self) -> int:
        """The bias of the exponent: the given one, or the usual one of `specials`."""
        if self.bias is not None:
            return self.bias
        return int(2 ** (self.exponent - 1)) - (self.specials not in ("fnuz", "p3109"))

    @property
    def has_nan(self) -> bool:  # type: ignore[override]
        return self.specials != "none"

    @property
    def overflow(self) -> float | None:
        infinite = self.specials in ("ieee", "p3109")
        if self.saturate is True or (self.saturate is None and not infinite):
            return None
        return torch.inf if infinite else torch.nan

    @property
    def reach(self) -> float:
        return self.max if self.full_scale is None else self.full_scale

    def following(self, values: Tensor) -> float:
        largest = float(values[-1])
        return largest + 2.0 ** (max(math.frexp(largest)[1] - 1, 1 - self.offset) - self.mantissa)

    @property
    def steps(self) -> Steps | None:
        if self.mantissa == 0 or not self.subnormals:
            return None
        return Steps(
            self.mantissa,
            1 - self.offset,
            self.min,
            self.max,
            overflow=self.overflow,
            signed_zero=self._has_negative_zero,
        )

    @property
    def native(self) -> torch.dtype | None:
        plain = self.specials == "ieee" and self.signed and self.bias is None and self.rounding == "even"
        return NATIVE.get((self.exponent, self.mantissa)) if plain and self.subnormals and self.overflow else None

    @property
    def _has_negative_zero(self) -> bool:
        return self.signed and self.specials not in ("fnuz", "p3109")

    def table(self) -> Tensor:
        code = torch.arange(2 ** (self.exponent + self.mantissa), dtype=torch.float64)
        ones, smallest = 2.0**self.mantissa, 2.0 ** (1 - self.offset - self.mantissa)
        field, fraction = (code / ones).floor(), code % ones
        value = (
            torch.where(field > 0, (ones + fraction) * power_of_two(field - 1), fraction * self.subnormals) * smallest
        )
        last = len(code) - 1
        if self.specials == "ieee":
            top = field == field[last]
            value = torch.where(top, torch.where(fraction == 0, torch.inf, torch.nan), value)
        elif self.specials == "fn":
            value[last] = torch.nan
        elif self.specials == "p3109":
            value[last - (not self.signed)] = torch.inf
        if not self.signed:
            if self.specials == "p3109":
                value[last] = torch.nan
            return value
        if self._has_negative_zero:
            return torch.cat([value, -value])
        both = torch.cat([value, 0.0 - value])  # no -0
        both[last + 1] = torch.nan
        return both

    def round(self, x: Tensor) -> Tensor:
        if self.mantissa == 0 or not self.subnormals:
            return super().round(x)
        if self.native is not None and x.dtype == torch.float32:
            return x.to(self.native).to(x.dtype)
        inside = x if self.signed else x.clamp(min=0.0)
        rounded = round_to_float(inside, self.mantissa, 1 - self.offset, self.max, self.rounding, self.seed)
        rounded = self.limit(rounded, inside)
        return rounded if self._has_negative_zero else rounded + 0.0  # -0 + 0 is +0


class P3109(Format):
    """A format of the IEEE P3109 working group by its name: `binary8p3se` has 8 bits and precision 3.

    The letters are s (signed) or u (unsigned), and e (extended, with Inf) or f (finite). K bits with precision P have
    P - 1 fraction bits and E = K - P exponent bits, or K - P + 1 if unsigned. The bias is 2^(E - 1). There are
    subnormals, no -0, and one NaN: the code of -0, or the topmost code if unsigned. Inf is the largest positive code.

    Values beyond the range become Inf in an extended format, and saturate in a finite one or with `saturate`. Formats
    with more than 8 exponent bits reach beyond float32, and are refused. Source: P3109 working group, value tables of
    2026.
    """

    name = "p3109"
    has_nan: ClassVar[bool] = True
    format: str = Field("binary8p3se", description="its name")
    saturate: bool = Field(False, description="clamp values that are too large, also where there is Inf")

    @field_validator("format")
    @classmethod
    def _exists(cls, format: str) -> str:
        _parts_of_name(format)
        return format.lower()

    @functools.cached_property
    def number(self) -> Float:
        """The same format by its bits and conventions."""
        bits, precision, signed, extended = _parts_of_name(self.format)
        exponent = bits - precision + (not signed)
        specials = "p3109" if extended else "fnuz" if signed else "fn"
        return Float(
            exponent=exponent,
            mantissa=precision - 1,
            specials=specials,
            bias=2 ** (exponent - 1),
            signed=signed,
            saturate=self.saturate or None,
            rounding=self.rounding,
            seed=self.seed,
        )

    def table(self) -> Tensor:
        return self.number.table()

    def following(self, values: Tensor) -> float:
        return self.number.following(values)

    def round(self, x: Tensor) -> Tensor:
        return self.number.round(x)

    @property
    def overflow(self) -> float | None:
        return self.number.overflow

    @property
    def steps(self) -> Steps | None:
        return self.number.steps


def _parts_of_name(name: str) -> tuple[int, int, bool, bool]:
    """Read the bits, the precision, signed and extended of a name of P3109."""
    found = re.fullmatch(r"[Bb]inary(\d{1,2})p(\d{1,2})([su])([ef])", name)
    if found is None:
        raise ValueError(f"a name is binaryKpP with se, sf, ue or uf, such as binary8p3se, not {name!r}")
    bits, precision, signed = int(found[1]), int(found[2]), found[3] == "s"
    if not 3 <= bits <= MOST_BITS or not 1 <= precision <= bits - signed:
        raise ValueError(f"there is no {name}: K goes from 3 to {MOST_BITS}, and P from 1 to K, or K - 1 if signed")
    if bits - precision + (not signed) > EXPONENT_BITS:
        raise ValueError(
            f"{name} reaches beyond float32's range; take a precision of {bits - EXPONENT_BITS + (not signed)}"
        )
    return bits, precision, signed, found[4] == "e"


class E8M0(Format):
    """Powers of two from 2^-127 to 2^127, and NaN: the scales of OCP MX v1.0, section 5.4.1.

    There is no zero and no sign: zero and negative values become 2^-127, and values that are too large 2^127. A tie,
    1.5 times a power of two, goes to the even code. This is IEEE 754's rule for one-bit significands. A cast in torch
    or ml_dtypes rounds a tie up (`rounding=away`).
    """

    name = "e8m0"
    has_nan: ClassVar[bool] = True

    @property
    def powers_of_two(self) -> bool:
        return True

    def table(self) -> Tensor:
        values = power_of_two(torch.arange(256) - 127)
        values[255] = torch.nan
        return values


class E6M2(Format):
    """Unsigned scales from 2^-48 to 1.5 * 2^15 with 2 fraction bits, and NaN: the shared scales of HiFloat4.

    There is no zero, and there are no subnormals: values below 2^-48, zero and negative ones become 2^-48. Values that
    are too large saturate. The topmost code is NaN. Source: arXiv 2602.11287.
    """

    name = "e6m2"
    has_nan: ClassVar[bool] = True

    def table(self) -> Tensor:
        code = torch.arange(256)
        values = (1 + (code % 4) / 4) * power_of_two(code // 4 - 48)
        values[255] = torch.nan
        return values


NAMED = [
    Preset("bf16", "float(8, mantissa=7, specials=ieee)", "bfloat16", stands_for_bits=16),
    Preset("fp16", "float(5, mantissa=10, specials=ieee)", "IEEE 754 binary16 (float16)"),
    Preset("tf32", "float(8, mantissa=10, specials=ieee)", "NVIDIA TF32, 19 bits"),
    Preset("e4m3", "float(4, mantissa=3, specials=fn)", "OCP FP8 v1.0 E4M3 (float8_e4m3fn), largest 448, saturating"),
    Preset("e5m2", "float(5, mantissa=2, specials=ieee)", "OCP FP8 v1.0 E5M2 (float8_e5m2), largest 57344, then Inf"),
    Preset("e4m3fnuz", "float(4, mantissa=3, specials=fnuz)", "no Inf, no -0, bias 8, largest 240, saturating"),
    Preset("e5m2fnuz", "float(5, mantissa=2, specials=fnuz)", "no Inf, no -0, bias 16, largest 57344, saturating"),
    Preset("e4m3b11fnuz", "float(4, mantissa=3, specials=fnuz, bias=11)", "as e4m3fnuz with bias 11, largest 30"),
    Preset("e3m4", "float(3, mantissa=4, specials=ieee)", "IEEE-like 8 bits, largest 15.5, then Inf"),
    Preset(
        "e5m3",
        "float(5, mantissa=3, specials=fn, signed=false)",
        "unsigned scales (UE5M3), bias 15, largest 114688, saturating",
    ),
    Preset("e3m2", "float(3, mantissa=2)", "OCP MX v1.0 FP6, largest 28"),
    Preset("e2m3", "float(2, mantissa=3)", "OCP MX v1.0 FP6, largest 7.5"),
    Preset("e2m1", "float(2, mantissa=1)", "OCP MX v1.0 FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6"),
    Preset("e1m2", "float(1, mantissa=2)", "4 bits: 0, 0.5, 1, … 3.5"),
    Preset("e3m0", "float(3, mantissa=0)", "4 bits: 0 and powers of two from 0.25 to 16"),
]
OF_TORCH = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float8_e4m3fn": "e4m3",
    "float8_e4m3fnuz": "e4m3fnuz",
    "float8_e5m2": "e5m2",
    "float8_e5m2fnuz": "e5m2fnuz",
    "float4_e2m1fn": "e2m1",
    "float4_e2m1fn_x2": "e2m1",
    "e4m3fn": "e4m3",
    "e2m1fn": "e2m1",
}
"""The names that torch and ml_dtypes have for these formats."""
EARLIER = [
    Preset(f"binary8p{p}{suffix}", f"float({8 - p}, mantissa={p - 1}, specials={specials})", doc.format(p=p))
    for p in range(1, 8)
    for suffix, specials, doc in (
        ("", "p3109", "IEEE P3109 binary8, precision {p}, with Inf"),
        ("f", "fnuz", "IEEE P3109 binary8, precision {p}, finite"),
    )
]
"""The names of earlier drafts of P3109."""
BINARY8 = [
    Preset(name, f"p3109({name})", f"IEEE P3109, 8 bits, precision {p}, {doc}")
    for p in range(1, 9)
    for letters, doc in (
        ("se", "signed, with Inf"),
        ("sf", "signed, finite"),
        ("ue", "unsigned, with Inf"),
        ("uf", "unsigned, finite"),
    )
    if p < 8 or letters[0] == "u"
    for name in [f"binary8p{p}{letters}"]
]


@hookimpl
def qsim_quantizers() -> list[type[Format] | Preset]:
    texts = {preset.name: preset.text for preset in NAMED}
    of_torch = [Preset(name, texts[ours], f"torch's name for {ours}") for name, ours in OF_TORCH.items()]
    of_torch += [Preset(name, "e8m0()", "torch's name for e8m0") for name in ("float8_e8m0fnu", "e8m0fnu")]
    return [Float, P3109, E8M0, E6M2, *NAMED, *of_torch, *EARLIER, *BINARY8]
