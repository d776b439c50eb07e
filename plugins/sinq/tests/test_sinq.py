"""SINQ against its formulas, written out for one tile with loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

import qsim_core as qsim
from qsim_core.formats.codes import Encoded
from qsim_core.testing import QuantizerSuite


def uneven(rows: int, columns: int) -> Tensor:
    """Return normal values whose columns and rows have very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.randn(columns, generator=generator).exp() * torch.randn(rows, 1, generator=generator).exp()


def columns_by_hand(tile: Tensor, steps: int) -> list[float]:
    """Even out the standard deviations of one tile, in Python's floats."""
    values = tile.double().tolist()
    rows, columns = range(len(values)), range(len(values[0]))
    c, r = [0.0 for _ in columns], [0.0 for _ in rows]
    best, least, target = c, math.inf, 0.0
    for step in range(steps):
        scaled = [[values[i][j] / math.exp(c[j]) / math.exp(r[i]) for j in columns] for i in rows]
        of_columns = [statistics.stdev(scaled[i][j] for i in rows) for j in columns]
        of_rows = [statistics.stdev(scaled[i]) for i in rows]
        if step == 0:
            target = min(max(1e-3, min(1e3, s)) for s in of_columns + of_rows) + 1e-6
        imbalance = max(of_columns + of_rows) / max(min(of_columns + of_rows), 1e-12)
        if imbalance > least:
            break
        best, least = c, imbalance
        change = [[math.log(min(max(s / target, 0.7), 2.0)) for s in all] for all in (of_columns, of_rows)]
        c = [min(max(a + b, -0.3), 10.0) for a, b in zip(c, change[0], strict=True)]
        r = [min(max(a + b, -0.3), 10.0) for a, b in zip(r, change[1], strict=True)]
    return [math.exp(a) for a in best]


@pytest.mark.parametrize("columns", [32, 44])
def test_each_tile_has_the_scales_of_its_definition(columns: int) -> None:
    x, quantizer = uneven(24, columns), qsim.parse("sinq(block(int4, 16), steps=12)")

    found = quantizer.columns(x)

    expected = [factor for tile in x.split(16, dim=1) for factor in columns_by_hand(tile, 12)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(quantizer(x), qsim.parse("block(int4, 16)")(x / found) * found)


def test_by_hand() -> None:
    """The columns' deviations are √2 times 8 and 1. One pass divides the first by 2, the most that a pass may."""
    x = torch.tensor([[8.0, 1.0], [-8.0, -1.0]])
    quantizer = qsim.parse("sinq(channel(int3), steps=2)")

    assert quantizer.columns(x).tolist() == pytest.approx([2.0, 1.0], rel=1e-5)
    assert quantizer(x).flatten().tolist() == pytest.approx([8.0, 4 / 3, -8.0, -4 / 3], rel=1e-5)
    assert qsim.parse("channel(int3)")(x).tolist() == [[8.0, 0.0], [-8.0, 0.0]]


@pytest.mark.parametrize("scheme", ["block(int4, n=64, symmetric=false)", "channel(int4)", "mxfp4"])
def test_uneven_columns_err_less(scheme: str) -> None:
    x = uneven(128, 128)
    columns = x.norm(dim=0)

    def error(text: str) -> float:
        return float(((qsim.parse(text)(x) - x).norm(dim=0) / columns).mean())

    assert error(f"sinq({scheme})") < 0.9 * error(scheme)


def test_a_row_alone_has_no_deviation_and_keeps_its_scheme() -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))

    assert torch.equal(qsim.parse("sinq")(x), qsim.parse("block(int4, n=64, symmetric=false)")(x))


def test_bits_count_the_columns() -> None:
    bits = qsim.parse("block(int4, 64)").bits_per_element(torch.Size([256, 128]))

    assert qsim.parse("sinq(block(int4, 64))").bits_per_element(torch.Size([256, 128])) == bits + 16 / 256


@pytest.mark.parametrize("text", ["sinq", "sinq(channel(int4))", "sinq(mxfp4)"])
@pytest.mark.parametrize("shape", [(24, 44), (5,), (), (0, 8), (4, 0)])
def test_codes_and_the_scales_of_columns_give_the_weight(text: str, shape: tuple[int, ...]) -> None:
    weight, quantizer = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16(), qsim.parse(text)

    assert torch.equal(quantizer.decode(quantizer.encode(weight)), quantizer(weight))


def test_the_bits_of_codes_count_the_columns() -> None:
    plain, twofold = (qsim.parse(text).encode(uneven(24, 32)).bits for text in ("mxfp4", "sinq(mxfp4)"))

    assert twofold == plain + 16 * 32


def test_each_of_stacked_weights_keeps_its_columns() -> None:
    quantizer, weights = qsim.parse("sinq(mxfp4)"), [uneven(24, 32), uneven(24, 32).flip(1)]
    stack = Encoded.stack([quantizer.encode(weight) for weight in weights])

    assert all(torch.equal(quantizer.decode(stack[i]), quantizer(weight)) for i, weight in enumerate(weights))


def test_codes_of_another_quantizer_are_refused() -> None:
    message = "^these codes have no scales of columns, by which sinq.mxfp4. would multiply$"
    with pytest.raises(qsim.QsimError, match=message):
        qsim.parse("sinq(mxfp4)").decode(qsim.parse("mxfp4").encode(uneven(24, 32)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sinq(tensor(int4))", "sinq: tensor(int4) shares scales over rows; sinq takes blocks or channels"),
        ("sinq(block(int4, [4, 4]))", "sinq: block(int4, n=[4, 4]) shares scales over rows"),
        ("sinq(block(int4, 16, gradient=lsq))", "sinq: block(int4, n=16, gradient=lsq) has static or learned scales"),
        ("sinq(steps=0)", "sinq: steps should be greater than 0, not 0"),
    ],
)
def test_what_it_cannot_take_is_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    assert str(error.value).startswith(message)


class TestSinq(QuantizerSuite):
    text = ("sinq", "sinq(channel(int4))")
