"""The audit of a simulated arithmetic: what its running sums did."""

from __future__ import annotations

import pytest
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


class Heads(nn.Module):
    """A product of activations with a matrix for each head."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.transpose(-1, -2)


def whole(*shape: int, seed: int) -> Tensor:
    return torch.randint(-40, 41, shape, generator=torch.Generator().manual_seed(seed)).float()


def by_loop(pairs: list[tuple[list[int], list[int]]], bits: int) -> dict[str, float]:
    """The shares and extremes that an audit tells of wrapped sums, from rows of whole numbers, one output a pair."""
    high = 2 ** (bits - 1) - 1
    could, left, wrong, seen = 0, 0, 0, [0]
    for x, w in pairs:
        sums = [sum(a * b for a, b in zip(x[:n], w[:n], strict=True)) for n in range(1, len(x) + 1)]
        could += sum(abs(a * b) for a, b in zip(x, w, strict=True)) > high
        left += not all(-high - 1 <= total <= high for total in sums)
        wrong += not -high - 1 <= sums[-1] <= high
        seen += sums
    largest = max(map(abs, seen))
    bits_needed = next(n for n in range(1, 64) if -(2 ** (n - 1)) <= min(seen) and max(seen) < 2 ** (n - 1))
    count = len(pairs)
    return {
        "outputs": count,
        "could_overflow": could / count,
        "overflowed": left / count,
        "inexact": wrong / count,
        "largest": largest,
        "bits": bits_needed,
    }


def told(model: nn.Module, example: tuple[Tensor, ...], recipe: dict[str, str]) -> dict[str, float | None]:
    with qsim.simulate(model, recipe, example=example) as simulation:
        (site,) = simulation.audit().sites
    assert site.sums is not None
    return site.sums.model_dump()


def test_the_sums_of_several_heads_are_those_of_a_loop_over_them() -> None:
    x, y = whole(2, 3, 5, 24, seed=0), whole(2, 3, 4, 24, seed=1)

    found = told(Heads(), (x, y), {"activations": "cast(int8)", "arithmetic": "int13"})

    rows = [(x[b, h].int().tolist(), y[b, h].int().tolist()) for b in range(2) for h in range(3)]
    expected = by_loop([(left, right) for lefts, rights in rows for left in lefts for right in rights], 13)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert 0 < expected["inexact"] < expected["overflowed"] < expected["could_overflow"]
    all_rows = [row for _, rights in rows for row in rights]
    assert found["safe_rows"] == sum(127 * sum(map(abs, row)) <= 2**12 - 1 for row in all_rows) / len(all_rows)


def test_the_sums_of_a_convolution_in_groups_are_those_of_a_loop_over_its_taps() -> None:
    model = nn.Conv2d(4, 6, 2, groups=2, bias=False)
    model.weight.data = whole(6, 2, 2, 2, seed=2)
    model.weight.data[0] = model.weight.data[4] = torch.eye(2).expand(2, 2, 2)  # rows that no input can make overflow
    x = whole(3, 4, 3, 3, seed=3)

    found = told(model, (x,), {"weights": "cast(int8)", "activations": "cast(int8)", "arithmetic": "int13"})

    pairs = []
    for image in x.int():
        for i in range(2):
            for j in range(2):
                for n, row in enumerate(model.weight.data.int()):
                    taps = image[2 * (n // 3) : 2 * (n // 3) + 2, i : i + 2, j : j + 2]
                    pairs.append((taps.flatten().tolist(), row.flatten().tolist()))
    expected = by_loop(pairs, 13)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert 0 < expected["overflowed"] < expected["could_overflow"]
    magnitudes = model.weight.data.abs().flatten(1).sum(1)
    assert found["safe_rows"] == int((127 * magnitudes <= 2**12 - 1).sum()) / 6


def test_a_matmul_in_float32_has_no_such_entry() -> None:
    assert sums(torch.ones(2, 4), torch.ones(1, 4), "float32") is None
