"""The audit of a simulated arithmetic: what its running sums did."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.matmuls.partial_sums import running


def sums(weight: Tensor, x: Tensor, arithmetic: str, scheme: str = "int8") -> qsim.Audit:
    model = nn.Sequential(nn.Linear(weight.shape[1], len(weight), bias=False))
    model[0].weight.data = weight
    with qsim.simulate(model, weights=scheme, activations=scheme, arithmetic=arithmetic, example=x) as simulation:
        (site,) = simulation.audit().sites
    return site.sums


def test_running_sums_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-9, 10, (rows, 37), generator=generator).float() for rows in (3, 4))

    low, high, total, magnitude, largest = running(x, w, every=5)

    for i in range(3):
        for j in range(4):
            products = (x[i] * w[j]).tolist()
            seen = [0.0, *(sum(products[:n]) for n in (*range(5, 37, 5), 37))]
            assert (low[i, j], high[i, j], total[i, j]) == (min(seen), max(seen), sum(products))
            assert (magnitude[i, j], largest[i, j]) == (sum(map(abs, products)), max(map(abs, products)))


def test_integers_tell_what_overflowed_and_how_many_bits_they_need() -> None:
    """Two rows of ones and minus ones: 127 * 127 is added up and taken away again, or added up eight times."""
    weight = torch.tensor([[1.0, -1.0] * 4, [1.0] * 8])

    found = sums(weight, torch.ones(1, 8), "int16(overflow=saturate)")

    assert (found.outputs, found.could_overflow, found.overflowed, found.inexact) == (2, 1.0, 0.5, 0.5)
    assert (found.largest, found.bits, found.safe_rows) == (8 * 127**2, 18, 0.0)


def test_guard_bits_are_gone_when_a_sum_is_read() -> None:
    found = sums(torch.ones(1, 8), torch.ones(1, 8), "integer(16, overflow=saturate, guard=4)")

    assert (found.overflowed, found.inexact, found.safe_rows) == (1.0, 1.0, 0.0)


def test_a_narrow_product_is_an_overflow_too() -> None:
    found = sums(torch.ones(1, 8), torch.ones(1, 8), "integer(20, product=12)")

    assert (found.could_overflow, found.overflowed, found.safe_rows) == (1.0, 1.0, 0.0)


def test_a_wrapped_sum_that_comes_back_is_exact() -> None:
    found = sums(torch.tensor([[1.0, -1.0] * 4, [1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 0.0]]), torch.ones(1, 8), "int16")

    assert (found.overflowed, found.inexact) == (0.5, 0.0)


def test_a_row_of_small_weights_is_safe_for_any_input() -> None:
    weight = torch.tensor([[1.0] * 8, [1.0] + [0.0] * 7])

    found = sums(weight, torch.ones(1, 8), "int16")

    assert (found.safe_rows, found.could_overflow, found.overflowed) == (0.5, 0.5, 0.5)


def test_sums_of_floats_tell_what_lost_low_bits() -> None:
    """2048 + 1 is not a number of float16, and 1024 + 1 is."""
    weight = torch.tensor([[1.0, 2.0**-11], [1.0, 2.0**-10]])

    found = sums(weight, torch.full((1, 2), 1.0), "sequential(fp16)", "cast(fp16)")

    assert (found.outputs, found.inexact, found.overflowed, found.bits) == (2, 0.5, 0.0, None)


def test_a_matmul_in_float32_has_no_such_entry() -> None:
    assert sums(torch.ones(2, 4), torch.ones(1, 4), "float32") is None
