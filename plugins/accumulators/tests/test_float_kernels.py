"""Sums in narrow floats in native code: the bits are those of the reference, for special values and in each mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qsim_core as qsim
from qsim_core.formats.random_bits import at
from qsim_core.sites.arithmetic import QuantizedRows
from qsim_core.testing.both_ways import WAYS, computed

pytestmark = pytest.mark.skipif(WAYS == ("reference",), reason="no accelerator is installed")
SPECIAL = [torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 1e30, -1e30, 2.0**-120, 3 * 2.0**-24, 1 + 2.0**-7]
ORDERS = ["sequential({0})", "chunked({0}, 3)", "chunked(bf16, 3, outer={0})", "tree({0}, product={0})"]
OVERFLOWS = ["fp16", "e4m3fnuz", "float(4, mantissa=3, specials=fn, saturate=false)"]
"""Formats that become Inf, saturate, and become NaN."""


def wide_rows(count: int, seed: int) -> Tensor:
    """Rows of 7 numbers in bfloat16, over many binades."""
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.randint(-30, 20, (2, count, 7), generator=generator)
    return torch.randn(2, count, 7, generator=generator).bfloat16().float() * torch.exp2(octaves)


@pytest.mark.parametrize("rounding", ["even", "zero", "away", "stochastic"])
@pytest.mark.parametrize("form", OVERFLOWS)
def test_the_bits_are_those_of_the_reference(form: str, rounding: str) -> None:
    left, right = wide_rows(len(SPECIAL), 0), wide_rows(17, 1)
    left[0, :, 3] = torch.tensor(SPECIAL)
    for order in ORDERS:
        text = order.format(qsim.parse(form).replace(rounding=rounding))
        accumulator = qsim.Host().parse(text, qsim.Arithmetic)
        found = []
        for way in WAYS:
            with computed(way):
                found.append(torch.cat([accumulator.add_up(left, w) for w in (right, right[0])]))

        native, reference = found

        torch.testing.assert_close(native, reference, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(native.signbit() | native.isnan(), reference.signbit() | reference.isnan())


@pytest.mark.parametrize("order", ["sequential({0})", "chunked({0}, 3, product={0})", "tree({0}, product=bf16)"])
def test_blocks_of_a_site_draw_the_numbers_of_the_reference(order: str) -> None:
    text = order.format("float(5, mantissa=4, rounding=stochastic, seed=8589934599)")
    accumulator = qsim.Host().parse(text, qsim.Arithmetic)
    left, right = (
        QuantizedRows.of(
            qsim.parse("block(e4m3, 5)"), torch.randn(*shape, 12, generator=torch.Generator().manual_seed(1))
        )
        for shape in [(2, 3), (2, 9)]
    )
    found = []
    for way in WAYS:
        with computed(way), at("layers.0.fc1", step=3) as place:
            found.append(accumulator.multiply(left, right))

    assert torch.equal(*found) and place.drawn
