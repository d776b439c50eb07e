"""Posits against the standard's definition in exact fractions, logarithms against the paper's formula."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import qsim_core as qsim
from qsim_core.testing import QuantizerSuite


def posit_value(code: int, bits: int, es: int) -> Fraction | None:
    """Compute ((1 - 3s) + f) * 2^((1 - 2s) * (2^es * r + e + s)) from the bits of a code (Posit Standard, 2022)."""
    if code == 0:
        return Fraction(0)
    if code == 1 << (bits - 1):
        return None
    word = format(code, f"0{bits}b")
    s, tail = int(word[0]), word[1:]
    k = len(tail) - len(tail.lstrip(tail[0]))
    r = -k if tail[0] == "0" else k - 1
    rest = tail[k + 1 :] + "0" * (es + 1)
    e, fraction = int("0" + rest[:es], 2), rest[es:]
    f = Fraction(int(fraction, 2), 2 ** len(fraction))
    return ((1 - 3 * s) + f) * Fraction(2) ** ((1 - 2 * s) * (2**es * r + e + s))


def posit_round(x: float, bits: int, es: int) -> Fraction:
    """Round by the Posit Standard, 2022: the boundary of two neighbours is the posit of one more bit between them."""
    half = 1 << (bits - 1)
    if x == 0:
        return Fraction(0)
    magnitude = Fraction(abs(x))
    below = max(code for code in range(half) if posit_value(code, bits, es) <= magnitude)  # type: ignore[operator]
    if below == half - 1 or posit_value(below, bits, es) == magnitude:
        chosen = below
    elif below == 0:
        chosen = 1
    else:
        middle = posit_value(2 * below + 1, bits + 1, es)
        chosen = below if magnitude < middle or (magnitude == middle and below % 2 == 0) else below + 1  # type: ignore[operator]
    return (posit_value(chosen, bits, es) or Fraction(0)) * (-1 if x < 0 else 1)


@pytest.mark.parametrize(("bits", "es"), [(8, 2), (8, 0), (8, 1), (6, 2), (3, 0), (5, 3), (16, 2)])
def test_every_code_has_the_standards_value(bits: int, es: int) -> None:
    table = qsim.parse(f"posit({bits}, es={es})").table()

    values = [posit_value(code, bits, es) for code in range(2**bits)]

    assert all(math.isnan(v) if e is None else v == e for v, e in zip(table.tolist(), values, strict=True))


@pytest.mark.parametrize(("bits", "es"), [(8, 2), (8, 0), (6, 1), (5, 2), (3, 0)])
def test_rounding_is_the_standards(bits: int, es: int) -> None:
    number = qsim.parse(f"posit({bits}, es={es})")
    points = torch.tensor(
        [float(v) for v in (posit_value(c, bits + 1, es) for c in range(2 ** (bits + 1))) if v is not None]
    )
    neighbours = [torch.nextafter(points, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([points, *neighbours, torch.tensor([0.0, 1e30, -1e30, 1e-30, -1e-30])])

    y = number(x)

    assert y.tolist() == [float(posit_round(v, bits, es)) for v in x.tolist()]


def test_well_known_posits() -> None:
    """By the Posit Standard, 2022, posit8 runs from 2^-24 to 2^24 and posit16 from 2^-56 to 2^56; 0x40 is one."""
    posit8, posit16 = qsim.parse("posit(8)"), qsim.parse("posit(16)")

    assert (posit8.max, float(posit8.table()[1]), float(posit8.table()[0x40])) == (2.0**24, 2.0**-24, 1.0)
    assert (posit16.max, float(posit16.table()[1])) == (2.0**56, 2.0**-56)


def test_only_zero_becomes_zero_and_inf_is_not_a_real() -> None:
    y = qsim.parse("posit(8)")(torch.tensor([0.0, 1e-38, -1e-38, 1e38, torch.inf, torch.nan]))

    assert y[:4].tolist() == [0.0, 2.0**-24, -(2.0**-24), 2.0**24]
    assert y[4:].isnan().all()


@pytest.mark.parametrize(("text", "lowest"), [("log2(4)", -6), ("log2(5, signed=false)", -30), ("log2(8)", -126)])
def test_log2_is_the_nearest_power_in_the_logarithm(text: str, lowest: int) -> None:
    number = qsim.parse(text)
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.5
    bits = torch.arange(2**15).to(torch.int16)
    halves = torch.cat([bits.view(torch.bfloat16).double(), bits.view(torch.float16).double()])
    x = torch.cat([x, x * 2.0**lowest, halves[~halves.isnan()]])

    y = number(x)

    exponent = torch.log2(x).round().clamp(max=0)
    assert torch.equal(y, torch.where(exponent >= lowest, torch.exp2(exponent), 0.0))


def test_log2_is_an_odd_function_if_it_has_a_sign() -> None:
    signed, unsigned = qsim.parse("log2(4)"), qsim.parse("log2(3, signed=false)")
    x = torch.tensor([0.3, 0.9, 5.0, 0.01, torch.inf])

    assert torch.equal(signed(-x), -signed(x))
    assert torch.equal(unsigned(-x), torch.zeros(5))
    assert torch.equal(unsigned(x), signed(x))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("posit(16, es=4)", "posit: its largest value, 2^224, is beyond float32's range; lower bits or es"),
        ("posit(2)", "posit: bits should be greater than or equal to 3, not 2"),
        ("log2(8, signed=false)", "log2: 8 unsigned bits reach below float32's range; take 7 bits at most"),
    ],
)  # fmt: skip
def test_options_that_make_no_format_are_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    assert str(error.value).startswith(message)


class TestExotic(QuantizerSuite):
    text = ("posit(8)", "posit(16)", "log2(4)", "log2(3, signed=false)")
