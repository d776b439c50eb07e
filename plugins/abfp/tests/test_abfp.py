"""ABFP against the definition, written out block by block."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

import qsim_core as qsim
from qsim_core.testing import QuantizerSuite


def by_the_book(row: np.ndarray, bits: int, n: int) -> np.ndarray:
    """arXiv 2307.03712: each vector of n is divided by max|x| / (2^(bits-1) - 1) in bfloat16, rounded, multiplied."""
    high = 2 ** (bits - 1) - 1
    parts = []
    for start in range(0, len(row), n):
        vector = row[start : start + n]
        scale = np.float32((np.abs(vector).max() / np.float32(high)).astype(ml_dtypes.bfloat16))
        parts.append(np.clip(np.rint(vector / scale), -high, high) * scale if scale else vector * 0)
    return np.concatenate(parts)


@pytest.mark.parametrize(("bits", "n", "length"), [(4, 64, 256), (4, 64, 200), (8, 128, 130), (3, 16, 7), (4, 1, 9)])
def test_abfp_is_the_papers_definition(bits: int, n: int, length: int) -> None:
    x = torch.randn(5, length, generator=torch.Generator().manual_seed(bits)) * 3

    y = qsim.parse(f"abfp(int{bits}, n={n})")(x)

    assert torch.equal(y, torch.from_numpy(np.stack([by_the_book(row, bits, n) for row in x.numpy()])))


def rows_of_vectors(row: np.ndarray, n: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The vectors of a row, and max|x| / 7 of each."""
    vectors = [row[start : start + n] for start in range(0, len(row), n)]
    return vectors, np.array([np.abs(vector).max() for vector in vectors]) / np.float32(7)


def rounded_under(scales: np.ndarray, vectors: list[np.ndarray]) -> np.ndarray:
    parts = [np.clip(np.rint(v / s), -7, 7) * s if s else v * 0 for v, s in zip(vectors, scales, strict=True)]
    return np.concatenate(parts)


@pytest.mark.parametrize(("n", "length"), [(64, 256), (64, 200), (16, 7)])
def test_a_second_level_of_scales_is_int8_in_units_of_the_rows_largest(n: int, length: int) -> None:
    """arXiv 2307.03712's open question: s = round(s / u) * u with u = max(s) / 127 over the row."""
    x = torch.randn(5, length, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, length)

    y = qsim.parse(f"abfp(int4, n={n}, scale=scaled(int8, channel))")(x)

    expected = []
    for row in x.numpy():
        vectors, exact = rows_of_vectors(row, n)
        unit = exact.max() / np.float32(127)
        expected.append(rounded_under(np.rint(exact / unit) * unit, vectors))
    assert torch.equal(y, torch.from_numpy(np.stack(expected)))


def test_a_scale_in_e8m0_is_the_nearest_power_of_two() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 50).unsqueeze(-1)

    y = qsim.parse("abfp(int4, n=16, scale=e8m0)")(x)

    powers = np.float32(2) ** np.arange(-60, 60, dtype=np.float32)
    expected = []
    for row in x.numpy():
        vectors, exact = rows_of_vectors(row, 16)
        nearest = np.abs(powers[:, None].astype(np.float64) - exact.astype(np.float64)).argmin(0)
        expected.append(rounded_under(powers[nearest], vectors))
    assert torch.equal(y, torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize(("rule", "up"), [("floor", 0), ("ceil", 1)])
def test_a_rule_makes_a_power_of_two_of_the_range(rule: str, up: int) -> None:
    """The largest INT4, 7, lies in the binade of 4: the scale is 2^(floor or ceil of log2 max|x|) / 4."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))

    y = qsim.parse(f"abfp(int4, n=16, scale=none, rule={rule})")(x)

    expected = []
    for row in x.numpy():
        vectors, _ = rows_of_vectors(row, 16)
        binades = [math.frexp(float(np.abs(vector).max()))[1] - 1 for vector in vectors]  # no maximum is a power of two
        expected.append(rounded_under(np.array([2.0 ** (b + up - 2) for b in binades], dtype=np.float32), vectors))
    assert torch.equal(y, torch.from_numpy(np.stack(expected)))


def test_it_is_a_name_for_scaled() -> None:
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))

    assert torch.equal(qsim.parse("abfp(e2m1, n=32)")(x), qsim.parse("scaled(e2m1, 32, bf16)")(x))


def test_the_scales_bits_are_counted() -> None:
    abfp = qsim.parse("abfp(int4, n=64)")

    assert abfp.bits_per_element(torch.Size([8, 256])) == 4 + 16 / 64
    assert abfp.bits_per_element(torch.Size([8, 65])) == 4 + 2 * 16 / 65


class TestAbfp(QuantizerSuite):
    text = ("abfp(int4)", "abfp(int8, n=7, scale=none)")
