"""Integers against numpy's rounding, ml_dtypes' ranges, torch's fake quantization and GPTQ's grid."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import qsim_core as qsim
from qsim_core.formats.format import Format
from qsim_core.testing import QuantizerSuite

CONVENTIONS = ["max", "power_of_two", "gptq"]


def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def every_float16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()


def a_million() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator).to(torch.int32).view(torch.float32)


def boundaries(low: float, high: float, step: float = 1.0) -> Tensor:
    """Return all multiples of step / 2 across the range and two steps beyond, each with its two float32 neighbours."""
    points = torch.arange(low - 2 * step, high + 2.5 * step, step / 2)
    below, above = (torch.nextafter(points, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    return torch.cat([points, below, above])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_same_bits(y: Tensor, expected: Tensor) -> None:
    assert torch.equal(y.isnan(), expected.isnan())
    known = ~y.isnan()
    assert torch.equal(y[known].view(torch.int32), expected[known].view(torch.int32))


@pytest.mark.parametrize("kind", ["narrow=true", "narrow=false", "signed=false"])
@pytest.mark.parametrize("bits", range(2, 17))
def test_integers_round_half_to_even_and_saturate(bits: int, kind: str) -> None:
    number = qsim.parse(f"int({bits}, {kind})")
    high = 2 ** (bits - (kind != "signed=false")) - 1
    low = {"narrow=true": -high, "narrow=false": -high - 1, "signed=false": 0}[kind]
    x = torch.cat([every_bfloat16(), every_float16(), a_million(), boundaries(low, high)])

    y = number(x)

    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = np.clip(np.rint(x.numpy()), low, high) + np.float32(0)
    assert_same_bits(y, torch.from_numpy(expected))
    assert (number.min, number.max) == (low, high)


@pytest.mark.parametrize(
    ("rounding", "by_numpy"),
    [("away", lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x)), ("zero", np.trunc)],
)
@pytest.mark.parametrize(
    ("text", "low", "high"), [("int4", -7, 7), ("int(8, narrow=false)", -128, 127), ("uint5", 0, 31)]
)
def test_other_roundings_are_numpys(text: str, low: int, high: int, rounding: str, by_numpy: Any) -> None:
    """The expected values are computed in float64, so that adding 0.5 to a float32 loses no bit that matters."""
    x = torch.cat([every_bfloat16(), every_float16(), a_million(), boundaries(low, high)])

    y = qsim.parse(text).replace(rounding=rounding)(x)

    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = np.clip(by_numpy(x.numpy().astype(np.float64)), low, high).astype(np.float32) + np.float32(0)
    assert_same_bits(y, torch.from_numpy(expected))


@pytest.mark.parametrize("rounding", ["even", "away", "zero", "stochastic"])
@pytest.mark.parametrize(
    "text", ["int4", "int(5, narrow=false)", "uint3", "int(8, fraction=6)", "int(16, fraction=16)"]
)
def test_direct_rounding_equals_the_search_in_the_table(text: str, rounding: str) -> None:
    number = qsim.parse(text).replace(rounding=rounding)
    x = torch.cat([every_bfloat16(), boundaries(number.min, number.max, number.beyond - number.max)])

    assert_same_bits(number.round(x), Format.round(number, x))


@pytest.mark.parametrize(("name", "dtype"), [("int2", ml_dtypes.int2), ("int4", ml_dtypes.int4), ("int8", np.int8),
                                              ("uint2", ml_dtypes.uint2), ("uint4", ml_dtypes.uint4), ("uint8", np.uint8)])  # fmt: skip
def test_the_full_range_is_that_of_ml_dtypes_integers(name: str, dtype: type) -> None:
    info = ml_dtypes.iinfo(dtype)
    quantizer = qsim.parse(name).full()

    y = quantizer(torch.tensor([-1e30, 1e30, float("-inf"), float("inf")]))

    assert y.tolist() == [info.min, info.max, info.min, info.max]


def test_nan_stays_and_there_is_no_negative_zero() -> None:
    y = qsim.parse("int4")(torch.tensor([float("nan"), -0.0, -0.4]))

    assert y[0].isnan()
    assert not y[1:].signbit().any()


def test_presets_cover_2_to_16_bits() -> None:
    assert [qsim.parse(f"int{bits}").bits for bits in range(2, 17)] == list(range(2, 17))
    assert [qsim.parse(f"uint{bits}").max for bits in range(2, 17)] == [2**bits - 1 for bits in range(2, 17)]


def test_codes_are_twos_complement() -> None:
    number = qsim.parse("int(4, narrow=false)")
    values = torch.arange(-8.0, 8.0)

    codes = number.encode(values).codes

    assert codes.tolist() == [v & 0b1111 for v in range(-8, 8)]
    assert torch.equal(number.from_codes(codes), values)


def test_the_lowest_code_of_the_narrow_range_has_no_value() -> None:
    assert qsim.parse("int4").table().isnan().nonzero().flatten().tolist() == [8]


def test_fixed_point_is_multiples_of_a_power_of_two() -> None:
    y = qsim.parse("int(8, fraction=6)")(torch.tensor([1 / 128, 3 / 128, 5.0, -5.0]))

    assert y.tolist() == [0.0, 2 / 64, 127 / 64, -127 / 64]


@pytest.mark.parametrize(("convention", "reach"), [("max", 7.0), ("gptq", 7.5), ("power_of_two", 8.0)])
def test_a_convention_names_the_value_of_the_largest_magnitude(convention: str, reach: float) -> None:
    x = noise(6, 40)
    scale = x.abs().amax(-1, keepdim=True) / reach

    y = qsim.parse(f"channel(int(4, narrow=false, convention={convention}))")(x)

    assert torch.equal(y, (x / scale).round().clamp(-8, 7) * scale)


def gptq_grid(x: Tensor, bits: int, sym: bool) -> Tensor:
    """Round row by row as GPTQ's reference does (quant.py: find_params, quantize), without its MSE search."""
    maxq = 2**bits - 1
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    scale = (high - low) / maxq
    zero = torch.full_like(scale, (maxq + 1) / 2) if sym else torch.round(-low / scale)
    scale, zero = scale[:, None], zero[:, None]
    return scale * ((torch.round(x / scale) + zero).clamp(0, maxq) - zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqs_symmetric_grid(bits: int) -> None:
    x = noise(32, 200)

    assert torch.equal(
        qsim.parse(f"channel(int({bits}, narrow=false, convention=gptq))")(x), gptq_grid(x, bits, sym=True)
    )


@pytest.mark.parametrize("element", ["int", "uint"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_gives_gptqs_asymmetric_grid(bits: int, element: str) -> None:
    x = torch.cat([noise(32, 200), noise(8, 200).abs() + 3, -noise(8, 200).abs() - 3])

    assert torch.equal(qsim.parse(f"channel({element}{bits}, symmetric=false)")(x), gptq_grid(x, bits, sym=False))


def test_a_zero_point_is_also_torchs_except_for_its_reciprocal() -> None:
    """Torch multiplies by 1/scale and qsim divides by scale, so a quotient near a half may round the other way."""
    x = noise(20_000)
    scale, zero = (x.max() - x.min()) / 255, torch.round(-x.min() / ((x.max() - x.min()) / 255))

    y = qsim.parse("tensor(uint8, symmetric=false)")(x)

    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), 0, 255)
    assert ((y - expected).abs() > scale / 2).float().mean() < 1e-3
    assert (y - expected).abs().max() < 1.01 * scale


def test_a_zero_point_keeps_zero_exact() -> None:
    x = noise(16, 33) + 1
    x[:, 5] = 0

    y = qsim.parse("channel(int4, symmetric=false)")(x)

    assert torch.equal(y[:, 5], torch.zeros(16))


def test_a_tie_goes_to_the_even_multiple_of_the_scale_whatever_the_zero_point_is() -> None:
    """The scale is 1 and the zero point is the code -5; its neighbours' codes are odd where the multiple is even."""
    x = torch.tensor([-3.0, 12.0, 0.5, 1.5, 2.5, -0.5])

    encoded = qsim.parse("tensor(int4, symmetric=false)").encode(x)

    codes = qsim.parse("int(4, narrow=false)").from_codes(encoded.codes, torch.float32)
    assert codes.tolist() == [-8, 7, -5, -3, -3, -5]


def test_an_unsigned_format_covers_the_positive_values() -> None:
    x = torch.tensor([[-100.0, 3.0, 15.0, 7.4]])

    assert qsim.parse("token(uint4)")(x).tolist() == [[0.0, 3.0, 15.0, 7.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int(4, convention=gptq)", "int: convention gptq needs signed integers with the full range: add narrow=false"),
        ("int(17)", "int: bits should be less than or equal to 16, not 17"),
        ("int(1)", "int: bits should be greater than or equal to 2, not 1"),
        ("channel(int(8, fraction=3), symmetric=false)", "channel: a zero point needs an integer format, not int(8, fraction=3)"),
        ("channel(int4, symmetric=false, rule=floor)", "channel: rule floor is for symmetric scales"),
        ("scaled(int4, 16, scale=int8)", "scaled: int8 as a scale needs a scale of its own, like scaled(int8, channel)"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    assert str(error.value).startswith(message)


class TestInt(QuantizerSuite):
    text = ("int4", "int(8, narrow=false)", "uint5", "int(8, fraction=6)", "int16")
