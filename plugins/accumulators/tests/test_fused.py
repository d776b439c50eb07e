"""The fused dot product against its formula in Python's integers, with and without native code."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import qsim_core as qsim
from qsim_core.sites.arithmetic import QuantizedRows
from qsim_core.testing import ArithmeticSuite, both_ways

__all__ = ["both_ways"]

RULES = {"e4m3": (3, -6), "e5m2": (2, -14), "fp16": (10, -14), "bf16": (7, -126), "tf32": (10, -126), "e2m1": (1, 0)}
"""Format -> its digits after the first, and its lowest exponent."""
REGISTERS = {"float32": (23, -126, 2.0**128), "e8m13": (13, -126, 2.0**128), "float16": (10, -14, 65520.0)}


HOST = qsim.Host()


def arithmetic(text: str) -> Any:
    return HOST.parse(text, qsim.Arithmetic)


pytestmark = pytest.mark.usefixtures("both_ways")


def apart(x: float, lowest: int) -> tuple[Fraction, int]:
    """s and e with x = s 2^e, 1 <= |s| < 2 unless e is the lowest exponent; of zero 0 and -126."""
    if x == 0:
        return Fraction(0), -126
    exponent = max(math.frexp(x)[1] - 1, lowest)
    return Fraction(x) / Fraction(2) ** exponent, exponent


def written(x: Fraction, digits: int, lowest: int, limit: float, nearest: bool) -> float:
    """Round to a register: toward zero, or to nearest even."""
    exponent = max(math.frexp(float(x))[1] - 1, lowest)
    unit = Fraction(2) ** (exponent - digits)
    rounded = (round(x / unit) if nearest else math.trunc(x / unit)) * unit
    return math.copysign(math.inf, rounded) if abs(rounded) >= limit else float(rounded)


def step(terms: list[tuple[Fraction, int]], plain: list[float], c: float, fraction: int, output: str) -> float:
    """One step of the unit: terms (s, e), which stand for `plain` numbers, and the running sum."""
    total = math.fsum([*plain, c]) if all(map(math.isfinite, [*plain, c])) else sum(plain) + c
    if not math.isfinite(total):
        return total
    digits, lowest, limit = REGISTERS[output]
    terms = [*terms, apart(c, lowest)]
    highest = max(exponent for _, exponent in terms)
    cut = [math.trunc(s * Fraction(2) ** (fraction + e - highest)) for s, e in terms]
    return written(Fraction(sum(cut)) * Fraction(2) ** (highest - fraction), digits, lowest, limit, output == "float16")


def by_formula(x: list[float], w: list[float], form: str, n: int, fraction: int, output: str) -> float:
    """The sum of products of two rows, in steps of n, term by term."""
    lowest, c = RULES[form][1], 0.0
    for first in range(0, len(x), n):
        terms, plain = [], []
        for a, b in zip(x[first : first + n], w[first : first + n], strict=True):
            finite = math.isfinite(a) and math.isfinite(b)
            (s, e), (t, f) = (apart(value if finite else 0.0, lowest) for value in (a, b))
            terms.append((s * t, e + f))
            plain.append(a * b)
        c = step(terms, plain, c, fraction, output)
    return c


def numbers(kind: str, rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=generator)
    exponents = torch.randint(-20, 12, (rows, length), generator=generator).float()
    if kind == "wide":
        return x * torch.exp2(exponents)
    if kind == "small":
        return x * 2.0**-14
    if kind == "cancelling":
        x[:, 1::2] = -x[:, ::2] * (1 + 2.0**-3 * x[:, 1::2])
    if kind == "sparse":
        return torch.where(exponents > 0, x, 0.0)
    return x


UNITS = [
    ("volta", "fp16", 4, 23, "float32"),
    ("turing", "fp16", 4, 24, "float32"),
    ("ampere", "bf16", 8, 24, "float32"),
    ("ampere_tf32", "tf32", 4, 24, "float32"),
    ("ada_fp8", "e5m2", 16, 13, "e8m13"),
    ("hopper", "fp16", 16, 25, "float32"),
    ("hopper", "bf16", 16, 25, "float32"),
    ("hopper_fp8", "e4m3", 32, 13, "e8m13"),
    ("hopper_fp8", "e5m2", 32, 13, "e8m13"),
    ("blackwell_fp8", "e2m1", 32, 25, "float32"),
    ("volta(output=float16)", "fp16", 4, 23, "float16"),
    ("fused(5, fraction=3)", "e4m3", 5, 3, "float32"),
]


@pytest.mark.parametrize("kind", ["plain", "wide", "small", "cancelling", "sparse"])
@pytest.mark.parametrize(("text", "form", "n", "fraction", "output"), UNITS)
def test_it_is_the_formula_term_by_term(text: str, form: str, n: int, fraction: int, output: str, kind: str) -> None:
    quantizer = qsim.parse(form)
    left, right = (QuantizedRows.of(quantizer, numbers(kind, 3, 70, seed)) for seed in (1, 2))

    product = arithmetic(text).multiply(left, right)

    rows = [[by_formula(x, w, form, n, fraction, output) for w in right.values.tolist()] for x in left.values.tolist()]
    assert product.tolist() == rows


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([math.inf, 1.0, 0.0], math.inf),
        ([math.inf, -math.inf, 1.0], math.nan),
        ([math.nan, 1.0, 1.0], math.nan),
        ([65504.0, 65504.0, 65504.0], 3 * 65504.0),
    ],
)
def test_inf_and_nan_are_those_of_a_plain_sum(x: list[float], expected: float) -> None:
    left, right = (QuantizedRows.of(qsim.parse("fp16"), torch.tensor([row])) for row in (x, [1.0, 1.0, 1.0]))

    product = arithmetic("hopper").multiply(left, right).item()

    assert product == expected or (math.isnan(product) and math.isnan(expected))


@pytest.mark.parametrize(
    ("place", "expected"),
    [(0, -math.inf), (16, -math.inf), (31, -math.inf), (32, math.nan), (47, math.nan)],
    ids=["the step before", "the same step", "its last product", "the step after", "the last product"],
)
def test_a_sum_that_is_infinite_by_its_size_meets_the_inf_of_a_later_step_alone(place: int, expected: float) -> None:
    x = torch.zeros(2, 48)
    x[:, 16:20] = 2.0**126  # too large for the register in the second step
    x[0, place] = -math.inf
    left, right = (QuantizedRows.of(qsim.parse("bf16"), rows) for rows in (x, torch.full((1, 48), 4.0)))

    product = arithmetic("hopper").multiply(left, right).flatten().tolist()

    assert str(product) == str([expected, math.inf])


def test_a_large_finite_sum_beside_a_row_with_inf_stays_finite() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[2.0**127, 2.0**127, -(2.0**102)], [math.inf, 0.0, 0.0]])
    x = torch.cat([x, torch.zeros(2, 5)], 1)
    left, right = (QuantizedRows.of(qsim.parse("bf16"), rows) for rows in (x, torch.ones(1, 8)))

    product = arithmetic("hopper").multiply(left, right).flatten().tolist()

    assert product == [largest, math.inf]


def test_a_step_longer_than_the_rows_takes_no_more_memory() -> None:
    left, right = (QuantizedRows.of(qsim.parse("e4m3"), numbers("plain", 2, 70, seed)) for seed in (1, 2))

    steps = [arithmetic(f"fused({n}, fraction=13)").multiply(left, right) for n in (70, 10**12)]

    assert torch.equal(*steps)


def test_what_is_too_large_for_the_register_is_infinite() -> None:
    rows = QuantizedRows.of(qsim.parse("bf16"), torch.full((1, 40), 2.0**63))

    assert arithmetic("hopper").multiply(rows, rows).item() == math.inf


def test_promotion_adds_the_sums_of_128_products_in_float32() -> None:
    left, right = (QuantizedRows.of(qsim.parse("e4m3"), numbers("plain", 1, 300, seed)) for seed in (1, 2))

    product = arithmetic("deepseek").multiply(left, right).item()

    x, w = left.values[0].tolist(), right.values[0].tolist()
    parts = [by_formula(x[i : i + 128], w[i : i + 128], "e4m3", 32, 13, "e8m13") for i in (0, 128, 256)]
    assert product == (torch.tensor(parts[0]) + parts[1] + parts[2]).item()


@pytest.mark.parametrize(
    ("place", "expected"), [(0, math.nan), (127, math.nan), (255, -math.inf)], ids=["first run", "its end", "same run"]
)
def test_inf_in_one_run_and_a_later_run_that_is_too_small_for_the_register_are_nan(place: int, expected: float) -> None:
    x = torch.zeros(2, 256)
    x[:, 128:160] = -(2.0**126)  # too large for the register in the second run
    x[0, place] = math.inf if place < 128 else -math.inf
    left, right = (QuantizedRows.of(qsim.parse("bf16"), rows) for rows in (x, torch.full((1, 256), 4.0)))

    product = arithmetic("hopper(promote=128)").multiply(left, right).flatten().tolist()

    assert str(product) == str([expected, -math.inf])


def test_exponents_of_mx_scales_join_those_of_the_products() -> None:
    quantizer, spread = qsim.parse("mx(e4m3)"), torch.tensor([2.0**-9, 1.0, 2.0**5]).repeat_interleave(32)
    left, right = (QuantizedRows.of(quantizer, numbers("plain", 2, 96, seed) * spread) for seed in (1, 2))

    product = arithmetic("blackwell_mx").multiply(left, right)

    def by_hand(x: Tensor, w: Tensor, of_x: Tensor, of_w: Tensor) -> float:
        c = 0.0
        for block in range(3):
            raised = sum(math.frexp(float(scale[block]))[1] - 1 for scale in (of_x, of_w))
            pairs = zip(x[32 * block : 32 * block + 32].tolist(), w[32 * block : 32 * block + 32].tolist(), strict=True)
            terms = [(s * t, e + f + raised) for (s, e), (t, f) in ((apart(a, -6), apart(b, -6)) for a, b in pairs)]
            c = step(terms, [0.0], c, 25, "float32")
        return c

    scales = [rows.scales.scale for rows in (left, right)]  # type: ignore[union-attr]
    expected = [
        [by_hand(left.units[i], right.units[j], scales[0][i], scales[1][j]) for j in range(2)] for i in range(2)
    ]
    assert product.tolist() == expected


def test_exact_sums_of_16_products_times_e4m3_scales_are_the_terms_of_nvfp4() -> None:
    quantizer = qsim.parse("block(e2m1, 16, scale=e4m3)")
    left, right = (QuantizedRows.of(quantizer, numbers("plain", 2, 128, seed)) for seed in (1, 2))

    product = arithmetic("blackwell_fp4").multiply(left, right)

    def by_hand(x: Tensor, w: Tensor, of_x: Tensor, of_w: Tensor) -> float:
        c = 0.0
        for first in (0, 4):
            terms = []
            for group in range(first, first + 4):
                exact = sum(Fraction(a) * Fraction(b) for a, b in zip(x[group], w[group], strict=True))
                (s, e), (t, f) = apart(of_x[group], -6), apart(of_w[group], -6)
                terms.append((exact * s * t, e + f))
            c = step(terms, [0.0], c, 35, "float32")
        return c

    units = [rows.units.unflatten(-1, (-1, 16)).tolist() for rows in (left, right)]
    scales = [rows.scales.scale.tolist() for rows in (left, right)]  # type: ignore[union-attr]
    expected = [[by_hand(units[0][i], units[1][j], scales[0][i], scales[1][j]) for j in range(2)] for i in range(2)]
    assert product.tolist() == expected


def test_a_tensor_scale_of_nvfp4_is_multiplied_afterwards() -> None:
    x, w = torch.zeros(1, 64), torch.zeros(1, 64)
    x[0, 0], w[0, 0] = 3.0, 5.0

    rows = [QuantizedRows.of(qsim.parse("nvfp4"), row) for row in (x, w)]

    assert arithmetic("blackwell_fp4").multiply(*rows).item() == pytest.approx(15.0, rel=1e-6)


@pytest.mark.parametrize(
    ("arithmetic", "weights", "activations", "message"),
    [
        ("hopper_fp8", "int4", "e4m3", "it takes e4m3 or e5m2, not int4"),
        ("hopper_fp8", "e4m3", None, "it takes e4m3 or e5m2, not numbers without a format"),
        ("fused(4, fraction=10)", "int4", "int4", "it takes a float format, not int4"),
        ("blackwell_mx", "e4m3", "mx(e4m3)", "it takes scales of blocks of 32, not channel(e4m3)"),
        ("blackwell_mx", "block(e4m3, 32)", "mx(e4m3)", "it takes scales in e8m0, not block(e4m3, n=32)"),
    ],
)
def test_formats_that_a_unit_does_not_take_are_named(
    arithmetic: str, weights: str, activations: str | None, message: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))

    with pytest.raises(qsim.RecipeError) as caught:
        qsim.simulate(
            model, weights=weights, activations=activations, arithmetic=arithmetic, example=torch.randn(2, 64)
        )

    assert str(caught.value).startswith("0: ") and str(caught.value).endswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fused(32, fraction=13, promote=100)", "promote=100 is not a multiple of the 32 products of a step"),
        ("fused(24, fraction=13, scales=groups)", "a step of 24 products has no whole groups of 16"),
    ],
)
def test_options_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError, match=message):
        arithmetic(text)


class TestHopper(ArithmeticSuite):
    text = "hopper_fp8"
    activations, weights = "token(e4m3)", "channel(e5m2)"


class TestBlackwell(ArithmeticSuite):
    text = "blackwell_mx"
    activations = weights = "mx(e2m1)"
