"""Sums of whole numbers in few bits against a loop over Python's integers, with and without native code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qsim_core as qsim
from qsim_core.sites.arithmetic import QuantizedRows
from qsim_core.testing import ArithmeticSuite, both_ways

__all__ = ["both_ways"]

HOST = qsim.Host()


def arithmetic(text: str) -> Any:
    return HOST.parse(text, qsim.Arithmetic)


pytestmark = pytest.mark.usefixtures("both_ways")


def wrap(x: int, bits: int) -> int:
    return (x + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def saturate(x: int, bits: int) -> int:
    return max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, x))


def by_loop(x: list[int], w: list[int], bits: int, overflow: str, guard: int, chunk: int, product: int | None) -> int:
    """Add up one chunk after the other, each kept in range."""
    narrow = wrap if overflow == "wrap" else saturate
    total = 0
    for first in range(0, len(x), chunk):
        pairs = zip(x[first : first + chunk], w[first : first + chunk], strict=True)
        added = sum(a * b if product is None else narrow(a * b, product) for a, b in pairs)
        total = narrow(total + added, bits + guard)
    return narrow(total, bits)


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
@pytest.mark.parametrize(
    ("bits", "guard", "chunk", "product"),
    [
        (16, 0, 1, None),
        (14, 0, 1, None),
        (14, 2, 1, None),
        (15, 0, 7, None),
        (15, 0, 1, 10),
        (12, 3, 4, 11),
        (32, 0, 1, None),
    ],
)
def test_it_is_a_loop_over_whole_numbers(bits: int, guard: int, chunk: int, product: int | None, overflow: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 90, generator=generator) for rows in (5, 20))
    x[3:], w[:4] = x[3:].abs(), w[:4].abs()  # some sums leave the range
    quantizer = qsim.parse("token(int8)")
    left, right = QuantizedRows.of(quantizer, x), QuantizedRows.of(quantizer, w)
    options = f"overflow={overflow}, guard={guard}, chunk={chunk}, product={product or 'none'}"

    sums = arithmetic(f"integer({bits}, {options})").add_up(left.units, right.units)

    codes = [[[int(code) for code in row] for row in rows.units.tolist()] for rows in (left, right)]
    expected = [[by_loop(a, b, bits, overflow, guard, chunk, product) for b in codes[1]] for a in codes[0]]
    assert sums.tolist() == expected


def test_some_of_those_sums_do_overflow() -> None:
    """A control: 14 bits are too few for some of the sums above, and enough for others."""
    rows = QuantizedRows.of(qsim.parse("token(int8)"), torch.ones(1, 90))

    sums = [arithmetic(f"integer({bits}, overflow=saturate)").add_up(rows.units, rows.units) for bits in (14, 22)]

    assert [int(total) for total in sums] == [2**13 - 1, 90 * 127**2]


@pytest.mark.parametrize(
    ("form", "unit"), [("e2m1", 2), ("e1m2", 2), ("e3m0", 4), ("int8(fraction=6)", 64), ("e2m3", 8)]
)
def test_formats_whose_values_are_whole_in_some_unit_are_added_up_in_it(form: str, unit: int) -> None:
    quantizer = qsim.parse(f"token({form})")
    rows = [
        QuantizedRows.of(quantizer, torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 2)
    ]

    product = arithmetic("int12(overflow=saturate)").multiply(*rows)

    x, w = (rows_.units * unit for rows_ in rows)
    assert torch.equal(x, x.round())
    for i in range(3):
        for j in range(3):
            total = by_loop([int(v) for v in x[i]], [int(v) for v in w[j]], 12, "saturate", 0, 1, None)
            scale = rows[0].scale[i, 0] / unit**2 * rows[1].scale[j, 0]
            assert product[i, j] == pytest.approx(total * float(scale), rel=1e-6)


def test_an_overflow_that_is_an_error_says_which_sum() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 1, bias=False))
    torch.nn.init.ones_(model[0].weight)
    qsim.simulate(model, weights="int8", activations="int8", arithmetic="int16(overflow=error)")

    with pytest.raises(qsim.QsimError, match=r"a sum of 48387 does not fit 16 bits"), torch.no_grad():
        model(torch.ones(1, 64))


def test_blocks_are_added_up_one_by_one() -> None:
    """Each block of 64 fits 20 bits, and the row does not."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 1, bias=False))
    torch.nn.init.ones_(model[0].weight)
    found = []
    for scheme in ("block(int8, 64)", "token(int8)"):
        weights = scheme.replace("token", "channel")
        with (
            qsim.simulate(model, weights=weights, activations=scheme, arithmetic="int21(overflow=saturate)"),
            torch.no_grad(),
        ):
            found.append(model(torch.ones(1, 256)).item())

    assert found == [pytest.approx(256.0), pytest.approx((2**20 - 1) / 127**2)]


@pytest.mark.parametrize(
    ("weights", "activations", "message"),
    [
        (
            "e4m3",
            "int8",
            "it adds up whole numbers, and in its second operand e4m3 has values that are not whole in any unit of 16 bits",
        ),
        (
            "int8",
            "bf16",
            "it adds up whole numbers, and in its first operand bf16 has values that are not whole in any unit of 16 bits",
        ),
        ("int8", None, "it takes a number format on both operands, alone or under scales"),
    ],
)
def test_formats_whose_values_are_not_whole_are_refused(weights: str, activations: str | None, message: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))

    with pytest.raises(qsim.RecipeError) as caught:
        qsim.simulate(model, weights=weights, activations=activations, arithmetic="int16", example=torch.randn(2, 64))

    assert str(caught.value).endswith(message)


class TestInteger(ArithmeticSuite):
    text = ("int16", "integer(12, overflow=saturate, guard=2, chunk=4, product=14)")
