"""ABFP against the definition, written out block by block."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import qsim_core as qsim


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


def test_it_is_a_name_for_scaled() -> None:
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))

    assert torch.equal(qsim.parse("abfp(e2m1, n=32)")(x), qsim.parse("scaled(e2m1, 32, bf16)")(x))


def test_the_scales_bits_are_counted() -> None:
    abfp = qsim.parse("abfp(int4, n=64)")

    assert abfp.bits_per_element(torch.Size([8, 256])) == 4 + 16 / 64
    assert abfp.bits_per_element(torch.Size([8, 65])) == 4 + 2 * 16 / 65
