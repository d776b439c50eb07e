"""Sums in narrow formats against exact fractions, each rounded once."""

from __future__ import annotations

import bisect
import functools
from fractions import Fraction
from typing import Any

import pytest
import torch
from qsim_accumulators.floats import odd_sum

import qsim_core as qsim
from qsim_core.formats.format import table_of
from qsim_core.sites.arithmetic import QuantizedRows
from qsim_core.testing import ArithmeticSuite, both_ways

__all__ = ["both_ways"]
pytestmark = pytest.mark.usefixtures("both_ways")
HOST = qsim.Host()


def arithmetic(text: str) -> Any:
    return HOST.parse(text, qsim.Arithmetic)


@functools.cache
def values_of(form: str) -> list[float]:
    return table_of(qsim.parse(form)).finite.tolist()  # type: ignore[no-any-return]


def nearest(x: Fraction, form: str) -> float:
    """The nearest value of a format, by a search in all its values; a tie goes to the even code."""
    if form == "float32":
        value = torch.tensor(float(x))
        near = [value, *(torch.nextafter(value, torch.tensor(end)) for end in (-torch.inf, torch.inf))]
        return min((one.item() for one in near), key=lambda one: abs(Fraction(one) - x))
    finite = values_of(form)
    place = bisect.bisect_left(finite, float(x))
    low, high = (finite[max(0, min(place + shift, len(finite) - 1))] for shift in (-1, 0))
    below, above = x - Fraction(low), Fraction(high) - x
    if below == above:
        return low if finite.index(low) % 2 == finite.index(0.0) % 2 else high
    return low if below < above else high


def in_order(terms: list[Fraction], form: str) -> float:
    total = nearest(terms[0], form)
    for term in terms[1:]:
        total = nearest(Fraction(total) + term, form)
    return total


def in_tree(terms: list[Fraction], form: str) -> float:
    level = [nearest(term, form) for term in terms]
    while len(level) > 1:
        pairs = [nearest(Fraction(a) + Fraction(b), form) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]


def operands(form: str, length: int) -> list[QuantizedRows]:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    rows = [
        torch.randn(2, length, generator=g) * torch.exp2(torch.randint(-4, 4, (2, length), generator=g))
        for g in generators
    ]
    return [QuantizedRows.of(qsim.parse(form), x) for x in rows]


def products(left: QuantizedRows, right: QuantizedRows, i: int, j: int) -> list[Fraction]:
    return [Fraction(a) * Fraction(b) for a, b in zip(left.values[i].tolist(), right.values[j].tolist(), strict=True)]


@pytest.mark.parametrize("form", ["float(5, mantissa=4)", "float(6, mantissa=2)", "float(5, mantissa=7)"])
@pytest.mark.parametrize("length", [1, 7, 32])
def test_sums_in_order_and_in_a_tree_are_exact_sums_rounded_once(form: str, length: int) -> None:
    left, right = operands("bf16", length)

    sequential, tree = (arithmetic(f"{name}({form})").multiply(left, right) for name in ("sequential", "tree"))

    for i in range(2):
        for j in range(2):
            assert sequential[i, j] == in_order(products(left, right, i, j), form)
            assert tree[i, j] == in_tree(products(left, right, i, j), form)


def test_chunks_have_a_wider_outer_sum() -> None:
    left, right = operands("bf16", 30)

    found = arithmetic("chunked(float(5, mantissa=4), 8)").multiply(left, right)[0, 0]

    terms = products(left, right, 0, 0)
    chunks = [Fraction(in_order(terms[first : first + 8], "float(5, mantissa=4)")) for first in range(0, 30, 8)]
    assert found == in_order(chunks, "float32")


def test_a_product_may_have_a_format_of_its_own() -> None:
    left, right = operands("bf16", 12)

    found = arithmetic("sequential(fp16, product=float(5, mantissa=2))").multiply(left, right)[0, 1]

    rounded = [Fraction(nearest(term, "float(5, mantissa=2)")) for term in products(left, right, 0, 1)]
    assert found == pytest.approx(in_order(rounded, "float(5, mantissa=10)"), rel=0)


def test_a_sum_rounded_to_odd_rounds_as_the_exact_sum_does() -> None:
    """1 + 2^-24 + 2^-60 is just above a tie of float32; rounded to float64 first, it is the tie."""
    a, b = (
        torch.tensor([1.0, 1.0], dtype=torch.float64),
        torch.tensor([2.0**-24 + 2.0**-60, 2.0**-24], dtype=torch.float64),
    )

    assert (a + b).float().tolist() == [1.0, 1.0]
    assert odd_sum(a, b).float().tolist() == [1.0 + 2.0**-23, 1.0]


def test_stochastic_sums_are_right_on_average_and_draw_anew_for_each_block() -> None:
    """A tiny product is lost beside 1 under rounding to nearest, and counts on average under stochastic rounding."""
    x = torch.full((1, 64), 2.0**-9)
    x[0, 0] = 1.0
    left, right = (
        QuantizedRows.of(qsim.parse("bf16"), x.expand(2000, 64)),
        QuantizedRows.of(qsim.parse("bf16"), torch.ones(1, 64)),
    )

    to_nearest = arithmetic("sequential(float(5, mantissa=4))").multiply(left, right)
    drawn = arithmetic("sequential(float(5, mantissa=4, rounding=stochastic))").multiply(left, right)

    assert to_nearest.unique().tolist() == [1.0]
    assert float(drawn.mean()) == pytest.approx(1 + 63 * 2.0**-9, rel=0.01)


class TestFloats(ArithmeticSuite):
    text = (
        "sequential(bf16)",
        "chunked(bf16, 8)",
        "tree(bf16)",
        "sequential(float(5, mantissa=7, rounding=stochastic), product=bf16)",
    )
