"""Floating point against ml_dtypes, torch and gfloat, bit for bit."""

from __future__ import annotations

import functools
import math

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from qsim_fp.rounding import round_by_magic_number, round_to_float_reference
from torch import Tensor

import qsim_core as qsim
from qsim_core.formats.format import Format, table_of
from qsim_core.testing import QuantizerSuite

ML_DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "float(4, 3, specials=ieee)": ml_dtypes.float8_e4m3,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e3m4": ml_dtypes.float8_e3m4,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
TORCH = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}
NAMES = [
    "p3109(binary6p3se)",
    "p3109(binary5p2sf, saturate=true)",
    "p3109(binary7p4uf)",
    "p3109(binary10p4ue)",
    *ML_DTYPES,
    "tf32",
    "e1m2",
    "e3m0",
    *(f"binary8p{p}{f}" for p in range(1, 8) for f in ("", "f")),
]
OTHERS = [
    "float(2, 3, bias=-3)",
    "float(3, 2, bias=9)",
    "float(5, 9)",
    "float(7, 3, specials=fn)",
    "float(6, 1, specials=ieee)",
    "float(4, 0, specials=fn)",
    "float(8, 3, bias=130)",
    "float(4, 3, specials=fn, signed=false)",
    "float(5, 3, specials=ieee, signed=false)",
    "float(6, 2, specials=p3109, signed=false)",
]
GFLOATS = {
    "bf16": gfloat.formats.format_info_bfloat16,
    "fp16": gfloat.formats.format_info_binary16,
    **{name: getattr(gfloat.formats, f"format_info_ocp_{name}") for name in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")},
    "p3109(binary6p3se)": gfloat.formats.format_info_p3109(6, 3),
    "p3109(binary5p2sf, saturate=true)": gfloat.formats.format_info_p3109(5, 2, domain=gfloat.Domain.Finite),
    "p3109(binary7p4uf)": gfloat.formats.format_info_p3109(7, 4, gfloat.Signedness.Unsigned, gfloat.Domain.Finite),
    "p3109(binary10p4ue)": gfloat.formats.format_info_p3109(10, 4, gfloat.Signedness.Unsigned),
    **{f"binary8p{p}": gfloat.formats.format_info_p3109(8, p) for p in range(1, 8)},
    **{f"binary8p{p}f": gfloat.formats.format_info_p3109(8, p, domain=gfloat.Domain.Finite) for p in range(1, 8)},
    "float(6, 2, specials=p3109, signed=false)": gfloat.formats.format_info_p3109(8, 3, gfloat.Signedness.Unsigned),
}
"""The formats that gfloat itself describes."""
BIASES = {
    "tf32": 127, "e3m4": 3, "e1m2": 0, "e3m0": 3, "float(4, 3, specials=ieee)": 7,
    "e4m3fnuz": 8, "e5m2fnuz": 16, "e4m3b11fnuz": 11,
    "float(2, 3, bias=-3)": -3, "float(3, 2, bias=9)": 9, "float(5, 9)": 15, "float(7, 3, specials=fn)": 63,
    "float(6, 1, specials=ieee)": 31, "float(4, 0, specials=fn)": 7, "float(8, 3, bias=130)": 130,
    "float(4, 3, specials=fn, signed=false)": 7, "float(5, 3, specials=ieee, signed=false)": 15,
}  # fmt: skip
"""The biases of the other formats, from their definitions."""
P3109 = [
    f"binary{bits}p{precision}{sign}{domain}"
    for bits in range(3, 16)
    for sign in "su"
    for precision in range(max(1, bits - 8 + (sign == "u")), bits + (sign == "u"))
    for domain in "ef"
]
"""All formats of P3109 from 3 to 15 bits whose values float32 holds: 8 exponent bits at most."""
GFLOAT_MODES = {
    "even": gfloat.RoundMode.TiesToEven,
    "away": gfloat.RoundMode.TiesToAway,
    "zero": gfloat.RoundMode.TowardZero,
}


def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def every_float16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()


@functools.cache
def a_million() -> Tensor:
    """Return floats of random bits, so that all exponents are equally likely."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator).to(torch.int32).view(torch.float32)


def boundaries(number: Format) -> Tensor:
    """Return all values of a format, the midpoints, values beyond the range, and both float32 neighbours of each."""
    values = table_of(number).finite
    middles = (values[1:] + values[:-1]) / 2
    beyond = number.max + (number.beyond - number.max) * torch.tensor([0.5, 1.0, 8.0], dtype=torch.float64)
    points = torch.cat([values, middles, beyond, -beyond]).float()
    below, above = (torch.nextafter(points, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan])
    return torch.cat([points, below, above, special])


def everything(number: Format) -> Tensor:
    return torch.cat([every_bfloat16(), every_float16(), boundaries(number), a_million()])


def assert_same_bits(y: Tensor, expected: Tensor) -> None:
    """Check that all bits are equal, the sign of zero too, and that NaN is in the same places."""
    assert torch.equal(y.isnan(), expected.isnan())
    known = ~y.isnan()
    assert torch.equal(y[known].view(torch.int32), expected[known].view(torch.int32))


def by_ml_dtypes(name: str, number: Format, x: Tensor) -> Tensor:
    inside = x.clamp(number.min, number.max) if number.overflow is None else x
    with np.errstate(over="ignore", invalid="ignore"):
        y = torch.from_numpy(inside.numpy().astype(ML_DTYPES[name]).astype(np.float32))
    return torch.where(x.isnan(), torch.nan, y)  # FP6 and FP4 have no NaN; ml_dtypes gives -0


def by_the_rules_of_p3109(bits: int, precision: int, signed: bool, extended: bool) -> np.ndarray:
    """Give the value of each code by the working group's decoding, in numpy."""
    code = np.arange(2**bits)
    half = 2 ** (bits - 1)
    negative = code > half if signed else np.zeros(len(code), dtype=bool)
    magnitude = np.where(negative, code - half, code)
    trailing, exponent = magnitude % 2 ** (precision - 1), magnitude // 2 ** (precision - 1)
    bias = 2 ** (bits - precision - 1) if signed else 2 ** (bits - precision)
    whole = trailing + np.where(exponent > 0, 2 ** (precision - 1), 0)
    value = np.ldexp(whole.astype(float), np.maximum(exponent, 1) - bias - (precision - 1))
    last = half - 1 if signed else 2**bits - 2
    if extended:
        value[magnitude == last] = np.inf
    value[half if signed else last + 1] = np.nan
    return np.where(negative, -value, value)


@pytest.mark.parametrize("bits", range(3, 16))
def test_p3109_is_decoded_by_its_rules(bits: int) -> None:
    named = [name for name in P3109 if name.startswith(f"binary{bits}p")]

    for name in named:
        precision = int(name.removeprefix(f"binary{bits}p")[:-2])
        expected = by_the_rules_of_p3109(bits, precision, name[-2] == "s", name[-1] == "e")
        assert np.array_equal(qsim.parse(f"p3109({name})").table().numpy(), expected, equal_nan=True), name


def test_p3109_by_hand() -> None:
    """The published tables of Binary3p2se, Binary3p1uf and Binary4p2uf."""
    nan, inf = math.nan, math.inf
    tables = {
        "binary3p2se": [0, 0.5, 1, inf, nan, -0.5, -1, -inf],
        "Binary3p1uf": [0, 0.125, 0.25, 0.5, 1, 2, 4, nan],
        "binary4p2uf": [0, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, nan],
    }

    for name, values in tables.items():
        assert np.array_equal(qsim.parse(f"p3109({name})").table().numpy(), values, equal_nan=True), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("binary8p3", "a name is binaryKpP with se, sf, ue or uf, such as binary8p3se, not 'binary8p3'"),
        ("binary8p8se", "there is no binary8p8se: K goes from 3 to 15, and P from 1 to K, or K - 1 if signed"),
        ("binary2p1se", "there is no binary2p1se: K goes from 3 to 15, and P from 1 to K, or K - 1 if signed"),
        ("binary15p1se", "binary15p1se reaches beyond float32's range; take a precision of 7"),
        ("binary15p7uf", "binary15p7uf reaches beyond float32's range; take a precision of 8"),
    ],
)
def test_a_name_that_p3109_does_not_have_is_refused(name: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(f"p3109({name})")

    assert message in str(error.value)


def test_the_names_of_eight_bits_are_presets() -> None:
    eight = [name for name in P3109 if name.startswith("binary8p")]

    assert len(eight) == 30
    assert all(qsim.parse(name) == qsim.parse(f"p3109({name})") for name in eight)
    assert torch.equal(qsim.parse("binary8p3se").table().nan_to_num(7), qsim.parse("binary8p3").table().nan_to_num(7))


def description(name: str) -> gfloat.FormatInfo:
    """Return gfloat's own description of a format, or build one from the format's options."""
    if name in GFLOATS:
        return GFLOATS[name]
    number = qsim.parse(name)
    extended = number.specials in ("ieee", "p3109")
    signed_zero = number.signed and number.specials not in ("fnuz", "p3109")
    high_nans = {"ieee": 2**number.mantissa - 1, "fn": 1, "none": 0, "fnuz": 0, "p3109": 0 if number.signed else 1}
    return gfloat.FormatInfo(
        name=name,
        k=number.signed + number.exponent + number.mantissa,
        precision=number.mantissa + 1,
        bias=BIASES[name],
        has_nz=signed_zero,
        domain=gfloat.Domain.Extended if extended else gfloat.Domain.Finite,
        num_high_nans=high_nans[number.specials],
        has_subnormals=True,
        is_signed=number.signed,
        is_twos_complement=False,
    )


def by_gfloat(name: str, number: Format, x: Tensor) -> Tensor:
    """Round with gfloat, except NaN. For an unsigned format negatives are clamped first, as gfloat takes magnitudes."""
    known = ~x.isnan()
    inside = x[known] if (number.min < 0) else x[known].clamp(min=0)
    mode, saturate = GFLOAT_MODES[number.rounding], number.overflow is None
    y = torch.full_like(x, torch.nan)
    rounded = gfloat.round_ndarray(description(name), inside.double().numpy(), mode, saturate)
    y[known] = torch.from_numpy(rounded).float() + (0.0 if not (number.min < 0) else -0.0)
    return y


@pytest.mark.parametrize("name", ML_DTYPES)
def test_a_format_agrees_with_ml_dtypes(name: str) -> None:
    number = qsim.parse(name)
    x = everything(number)

    assert_same_bits(number(x), by_ml_dtypes(name, number, x))


@pytest.mark.parametrize("name", TORCH)
def test_a_format_agrees_with_torchs_own(name: str) -> None:
    number = qsim.parse(name)
    x = everything(number)

    assert_same_bits(
        number(x),
        x.to(TORCH[name]).float() if number.overflow else x.clamp(number.min, number.max).to(TORCH[name]).float(),
    )


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_a_format_agrees_with_gfloat(name: str) -> None:
    number = qsim.parse(name)
    x = everything(number)

    assert_same_bits(number(x), by_gfloat(name, number, x))


@pytest.mark.parametrize("rounding", ["away", "zero"])
@pytest.mark.parametrize("name", ["bf16", "e4m3", "e5m2", "e4m3fnuz", "e3m0", "e2m1", "binary8p3", "binary8p1"])
def test_other_roundings_agree_with_gfloat(name: str, rounding: str) -> None:
    number = qsim.parse(f"{name}(rounding={rounding})")
    x = everything(number)

    assert_same_bits(number(x), by_gfloat(name, number, x))


@pytest.mark.parametrize("rounding", ["even", "away", "zero", "stochastic"])
@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_direct_rounding_equals_the_search_in_the_table(name: str, rounding: str) -> None:
    number = qsim.parse(name).replace(rounding=rounding)
    x = torch.cat([every_bfloat16(), boundaries(number)])

    assert_same_bits(number.round(x), Format.round(number, x))
    assert_same_bits(number.round(x.double()).float(), Format.round(number, x))


def test_e6m2_is_a_scale_without_zero() -> None:
    x = torch.tensor([0.0, 1.0, 1.125, 1.375, 3.6, -2.0, 2.0**-60, 50000.0, torch.inf, torch.nan])

    y = qsim.parse("e6m2")(x)

    assert y[:-1].tolist() == [2.0**-48, 1.0, 1.0, 1.5, 3.5, 2.0**-48, 2.0**-48, 49152.0, 49152.0]
    assert y[-1].isnan()
    assert qsim.parse("e6m2").encode(x[1:5]).codes.tolist() == [192, 192, 194, 199]


def test_e5m3_spans_what_e4m3_needs_a_second_scale_for() -> None:
    scales = qsim.parse("e5m3")

    assert (scales.max, scales.min, scales.width) == (114688.0, 0.0, 8)
    assert scales(torch.tensor([2.0**-17, 1.1, 1e6, -1.0])).tolist() == [2.0**-17, 1.125, 114688.0, 0.0]


@pytest.mark.parametrize("text", ["e4m3(saturate=false)", "e4m3fnuz(saturate=false)", "float(4, 3, specials=fnuz, saturate=false)"])  # fmt: skip
def test_without_inf_overflow_is_nan_as_in_ml_dtypes(text: str) -> None:
    number = qsim.parse(text)
    x = everything(number)
    name = "e4m3fnuz" if "fnuz" in text else "e4m3"

    assert_same_bits(number(x), by_ml_dtypes(name, number, x))


def test_e8m0_is_a_power_of_two_with_ties_to_the_even_code() -> None:
    x = torch.tensor([3.0, 0.75, 1.5, 1.25, 2.0**-140, 0.0, -5.0, torch.inf, torch.nan])

    y = qsim.parse("e8m0")(x)

    assert y[:-1].tolist() == [2.0, 0.5, 2.0, 1.0, 2.0**-127, 2.0**-127, 2.0**-127, 2.0**127]
    assert y[-1].isnan()


@pytest.mark.parametrize(("rounding", "oracle"), [("even", "gfloat"), ("away", "ml_dtypes"), ("away", "torch")])
def test_e8m0_agrees_with_each_library_that_rounds_ties_the_same_way(rounding: str, oracle: str) -> None:
    x = torch.cat([every_bfloat16(), a_million()])
    x = x[x.isfinite() & (x >= 2.0**-126) & (x < 1.5 * 2.0**127)]  # torch and ml_dtypes round subnormals up

    y = qsim.parse(f"e8m0(rounding={rounding})")(x)

    if oracle == "gfloat":
        info, mode = gfloat.formats.format_info_ocp_e8m0, gfloat.RoundMode.TiesToEven
        expected = torch.from_numpy(gfloat.round_ndarray(info, x.double().numpy(), mode, True)).float()
    elif oracle == "torch":
        expected = x.to(torch.float8_e8m0fnu).float()
    else:
        expected = torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert_same_bits(y, expected)


@pytest.mark.parametrize("name", [name for name in [*NAMES, *OTHERS] if name != "tf32"])
def test_codes_are_those_of_the_standard(name: str) -> None:
    table, described = qsim.parse(name).table(), description(name)
    expected = [gfloat.decode_float(described, code).fval for code in range(len(table))]

    assert torch.equal(
        table.nan_to_num(nan=12345.0), torch.tensor(expected, dtype=torch.float64).nan_to_num(nan=12345.0)
    )
    assert torch.equal(table.signbit()[~table.isnan()], torch.tensor(expected).signbit()[~table.isnan()])


@pytest.mark.parametrize("name", [*NAMES, *OTHERS, "e8m0"])
def test_every_value_keeps_its_code(name: str) -> None:
    number = qsim.parse(name)
    table = number.table()
    values = table[~table.isnan()].float()

    encoded = number.encode(values)

    if number.overflow is not None or not table.isinf().any():
        assert torch.equal(encoded.codes.long(), (~table.isnan()).nonzero().flatten())
    assert_same_bits(number.decode(encoded), number(values))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "bf16", "binary8p3", "e4m3fnuz"])
def test_nan_has_a_code_where_the_format_has_one(name: str) -> None:
    number = qsim.parse(name)

    assert number.decode(number.encode(torch.tensor([1.0, torch.nan]))).isnan().tolist() == [False, True]


def test_nan_without_a_code_is_an_error() -> None:
    with pytest.raises(qsim.QsimError, match=r"^nan has no code in e2m1$"):
        qsim.parse("e2m1").encode(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize(
    "text", ["e8m0", "e4m3(subnormals=false)", "e3m4(subnormals=false, saturate=true)", "e5m2fnuz(subnormals=false)"]
)
def test_formats_that_gfloat_lacks_round_to_the_nearest_value_of_the_table(text: str) -> None:
    """Every distance is compared in float64. Of two nearest values the even code wins, of two even codes the lower."""
    number = qsim.parse(text)
    table = number.table()
    codes = torch.arange(len(table))[table.isfinite()]
    codes = codes[
        torch.argsort(codes % 2 * 1000 + table[codes].abs().argsort().argsort())
    ]  # in the order of preference
    x = torch.cat([every_bfloat16(), every_float16(), boundaries(number)])
    x = x[~x.isnan()]
    inside = x.double().clamp(number.min, number.max)

    nearest = torch.cat([codes[(part[:, None] - table[codes]).abs().argmin(1)] for part in inside.split(8192)])

    assert torch.equal(number(x).double(), table[nearest])


def test_without_subnormals_zero_and_the_smallest_normal_are_neighbours() -> None:
    x = torch.tensor([0.49, 0.5, 0.51, 0.99, 1.0, 1.12, 1.13, -0.51]) * 2.0**-6

    y = qsim.parse("e4m3(subnormals=false)")(x)

    assert (y * 2.0**6).tolist() == [0, 0, 1, 1, 1, 1.125, 1.125, -1]


@pytest.mark.parametrize(("text", "signed_zero"), [("e4m3", True), ("e4m3fnuz", False), ("binary8p3", False)])
def test_without_subnormals_there_is_a_negative_zero_only_where_the_format_has_one(
    text: str, signed_zero: bool
) -> None:
    y = qsim.parse(f"{text}(subnormals=false)")(torch.tensor([-1e-9, -0.0]))

    assert y.tolist() == [0.0, 0.0]
    assert y.signbit().tolist() == [signed_zero, signed_zero]


@pytest.mark.parametrize("name", list(ML_DTYPES))
def test_float64_is_rounded_once(name: str) -> None:
    number = qsim.parse(name)
    step = 2.0**-number.mantissa
    just_above_a_tie = torch.tensor([1 + step / 2 + 2.0**-40], dtype=torch.float64)

    assert number(just_above_a_tie).item() == 1 + step


@pytest.mark.parametrize(
    ("name", "largest", "step"),
    [("bf16", 3.3895313892515355e38, 2.0**120), ("fp16", 65504, 32), ("e4m3", 448, 32), ("e5m2", 57344, 8192),
     ("e4m3fnuz", 240, 16), ("e5m2fnuz", 57344, 8192), ("e3m4", 15.5, 0.5), ("e3m2", 28, 4), ("e2m3", 7.5, 0.5),
     ("e2m1", 6, 2), ("e1m2", 3.5, 0.5), ("e3m0", 16, 16), ("e8m0", 2.0**127, 2.0**126), ("binary8p1", 2.0**62, 2.0**62), ("binary8p3", 49152, 8192),
     ("binary8p3f", 57344, 8192), ("binary8p4", 224, 16)],
)  # fmt: skip
def test_the_largest_value_is_the_standards(name: str, largest: float, step: float) -> None:
    number = qsim.parse(name)

    assert (number.max, number.beyond - number.max) == (largest, step)


@pytest.mark.parametrize(
    ("text", "result"),
    [("e5m2", torch.inf), ("e5m2(saturate=true)", 57344.0), ("e5m2(rounding=zero)", 57344.0), ("e4m3", 448.0)],
)
def test_overflow_is_the_users_choice(text: str, result: float) -> None:
    assert qsim.parse(text)(torch.tensor([1e6])).item() == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("float(8, 3)", "its largest value 6.4e+38 is beyond float32's; 8 exponent bits need specials=ieee"),
        ("float(8, 3, bias=-9)", "its largest value 5.6e+79 is beyond float32's; raise the bias"),
        ("float(4, 3, bias=200)", "its smallest value 1.6e-61 is below float32's; lower the bias"),
        ("float(8, 11)", "a float has at most 19 bits, not 1 + 8 + 11"),
        ("float(1, 0, specials=fn)", "with fn specials zero is the only value left"),
        ("float(1, 0, signed=false)", "a float has at least 2 bits, not 1"),
        ("float(4, 3, saturate=false)", "a format without Inf and NaN always saturates; leave saturate=false out"),
        ("float(4, 3, specials=fnuz, signed=false)", "fnuz gives the code of -0 to NaN, but an unsigned format has no -0"),
    ],
)  # fmt: skip
def test_options_that_make_no_format_are_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    assert str(error.value).startswith(f"float: {message}")


class TestFloat(QuantizerSuite):
    text = (
        "bf16",
        "fp16",
        "tf32",
        "e4m3",
        "e5m2",
        "e4m3fnuz",
        "e3m4",
        "e3m2",
        "e2m1",
        "binary8p1",
        "binary8p3",
        "float(4, 3, subnormals=false)",
        "e8m0",
        "e6m2",
        "p3109(binary6p3se)",
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fp8", "'e4m3' or 'e5m2'"),
        ("fp4", "'e2m1'"),
        ("fp4_e2m1", "'e2m1'"),
        ("e5m2fn", "'e5m2'"),
    ],
)
def test_the_names_of_other_projects_lead_to_ours(name: str, meant: str) -> None:
    with pytest.raises(
        qsim.SpecError, match=f"^no quantizer '{name}'; did you mean {meant}(?: or '.+')?[?] There are "
    ):
        qsim.Host().parse(name, qsim.Quantizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint32, torch.bool, torch.complex64])
def test_a_dtype_that_is_no_format_leads_to_no_other_width(dtype: torch.dtype) -> None:
    with pytest.raises(qsim.SpecError, match=f"qsim has no format like {dtype}; the widest are int32 and fp32"):
        qsim.parse(str(dtype))


@pytest.mark.parametrize(("name", "width"), [("int", "int32"), ("short", "int16"), ("float", "float32")])
def test_torchs_short_names_have_torchs_widths(name: str, width: str) -> None:
    """Without `torch.` the name `int` is the component of qsim, which has eight bits."""
    assert qsim.parse(f"torch.{name}") == qsim.parse(width)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
)  # fmt: skip
def test_torchs_name_is_a_format_that_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 4

    assert torch.equal(qsim.parse(str(dtype))(x), x.to(dtype).float())
    assert qsim.parse(str(dtype)) == qsim.parse(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("mantissa", "exponent", "largest"), [(3, -6, 448.0), (2, -14, 57344.0), (1, 0, 6.0), (10, -14, 65504.0)]
)
def test_the_fast_rounding_is_the_reference(mantissa: int, exponent: int, largest: float) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(3), dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x = x[~x.isnan()].clamp(-2 * largest, 2 * largest)

    fast = round_by_magic_number(x, mantissa, exponent)

    assert torch.equal(fast.view(torch.int32), round_to_float_reference(x, mantissa, exponent).view(torch.int32))
