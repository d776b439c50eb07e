"""Floating point against ml_dtypes, numpy and gfloat, bit for bit."""

from __future__ import annotations

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch

import qsim_core as qsim
from qsim_core import numerics

FORMATS = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
SATURATING = {"e4m3": 448.0, "e2m1": 6.0}


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()


def boundaries(name: str) -> torch.Tensor:
    """Every value of the format, every midpoint between two, and both float32 neighbours of each."""
    width = np.dtype(FORMATS[name]).itemsize * 8
    codes = np.arange(2**width).astype(f"uint{width}") if name != "e2m1" else np.arange(16, dtype=np.uint8)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = codes.view(FORMATS[name]).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    middles = (values[1:] + values[:-1]) / 2
    beyond = values[-1] + (values[-1] - values[-2]) * np.array([0.5, 1.0, 8.0])
    points = torch.from_numpy(np.concatenate([values, middles, beyond, -beyond])).float()
    below, above = (torch.nextafter(points, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    return torch.cat([points, below, above, torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan])])


def oracle(name: str, x: torch.Tensor) -> torch.Tensor:
    limit = SATURATING.get(name, np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(np.clip(x.numpy(), -limit, limit).astype(FORMATS[name]).astype(np.float32))


def assert_same_bits(y: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    """Equal bits, the sign of zero too; NaN exactly where the input is NaN."""
    assert torch.equal(y.isnan(), x.isnan())
    known = ~x.isnan()
    assert torch.equal(y[known].view(torch.int32), expected[known].view(torch.int32))


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_agrees_with_its_oracle_on_every_bfloat16_and_at_every_boundary(name: str) -> None:
    x = torch.cat([every_bfloat16(), boundaries(name)])

    y = qsim.parse(name)(x)

    assert_same_bits(y, oracle(name, x), x)


@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_agrees_too(name: str) -> None:
    x = torch.cat([every_bfloat16(), boundaries(name)])
    number = qsim.parse(name)

    bound = min(2 * number.max, torch.finfo(torch.float32).max)
    y = numerics.round_to_float_reference(x.clamp(-bound, bound), number.mantissa, 1 - number.bias)
    infinite = torch.copysign(torch.tensor(torch.inf), y)
    y = y.clamp(-number.max, number.max) if number.saturates else torch.where(y.abs() > number.max, infinite, y)

    assert_same_bits(y, oracle(name, x), x)


@pytest.mark.parametrize(("exponent", "mantissa"), [(2, 3), (3, 2), (3, 0), (1, 2), (4, 4), (6, 1), (7, 3), (5, 9)])
def test_any_split_without_specials_agrees_with_gfloat(exponent: int, mantissa: int) -> None:
    info = gfloat.FormatInfo(
        name="x",
        k=1 + exponent + mantissa,
        precision=mantissa + 1,
        bias=2 ** (exponent - 1) - 1,
        has_nz=True,
        domain=gfloat.Domain.Finite,
        num_high_nans=0,
        has_subnormals=True,
        is_signed=True,
        is_twos_complement=False,
    )
    x = every_bfloat16()[::7]
    number = qsim.parse(f"float({exponent}, {mantissa})")

    y = number(x)

    known = ~x.isnan()
    expected = gfloat.round_ndarray(info, x[known].double().numpy(), gfloat.RoundMode.TiesToEven, True)
    assert number.max == info.max
    assert torch.equal(y[known], torch.from_numpy(expected).float())


@pytest.mark.parametrize("name", FORMATS)
def test_float64_is_rounded_once(name: str) -> None:
    number = qsim.parse(name)
    step = 2.0**-number.mantissa
    just_above_a_tie = torch.tensor([1 + step / 2 + 2.0**-40], dtype=torch.float64)

    assert number(just_above_a_tie).item() == 1 + step


@pytest.mark.parametrize(
    ("name", "largest", "last_step"),
    [("bf16", 3.3895313892515355e38, 2.0**120), ("fp16", 65504, 32), ("e4m3", 448, 32), ("e5m2", 57344, 8192), ("e2m1", 6, 2)],
)  # fmt: skip
def test_the_largest_value_is_the_standards(name: str, largest: float, last_step: float) -> None:
    number = qsim.parse(name)

    assert (number.max, number.last_step) == (largest, last_step)


@pytest.mark.parametrize(("text", "result"), [("e5m2", torch.inf), ("float(5, 2, specials=ieee, saturate=true)", 57344.0),
                                              ("float(4, 3, specials=fn, saturate=false)", torch.inf)])  # fmt: skip
def test_overflow_is_the_users_choice(text: str, result: float) -> None:
    assert qsim.parse(text)(torch.tensor([1e6])).item() == result


def test_a_range_beyond_float32_is_refused() -> None:
    with pytest.raises(qsim.SpecError, match="its largest value 6.4e\\+38 is beyond float32's; 8 exponent bits need"):
        qsim.parse("float(8, 3)")


def test_more_than_16_bits_are_refused() -> None:
    with pytest.raises(qsim.SpecError, match="a float has at most 16 bits, not 1 \\+ 8 \\+ 8"):
        qsim.parse("float(8, 8)")
