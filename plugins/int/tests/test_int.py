"""Integers against numpy's rounding and ml_dtypes' ranges."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import qsim_core as qsim


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


def boundaries(low: int, high: int) -> torch.Tensor:
    """All halves across the range and beyond, each with its two float32 neighbours."""
    points = torch.arange(low - 2, high + 2.5, 0.5) if high < 3000 else torch.arange(low - 2, high + 3.0, 0.5)
    below, above = (torch.nextafter(points, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    return torch.cat([points, below, above])


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("bits", range(2, 17))
def test_integers_round_half_to_even_and_saturate(bits: int, narrow: bool) -> None:
    high = 2 ** (bits - 1) - 1
    low = -high if narrow else -high - 1
    x = torch.cat([every_bfloat16(), boundaries(low, high)])

    y = qsim.parse(f"int({bits}, narrow={str(narrow).lower()})")(x)

    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = np.clip(np.rint(x.numpy()), low, high) + np.float32(0)
    assert torch.equal(y.isnan(), x.isnan())
    known = ~x.isnan()
    assert torch.equal(bits_of(y[known]), bits_of(torch.from_numpy(expected)[known]))


@pytest.mark.parametrize(("name", "dtype"), [("int2", ml_dtypes.int2), ("int4", ml_dtypes.int4), ("int8", np.int8)])
def test_the_full_range_is_that_of_the_oracles_integers(name: str, dtype: type) -> None:
    info = ml_dtypes.iinfo(dtype)
    quantizer = qsim.parse(name).replace(narrow=False)

    y = quantizer(torch.tensor([-1e30, 1e30, float("-inf"), float("inf")]))

    assert y.tolist() == [info.min, info.max, info.min, info.max]


def test_nan_stays_and_there_is_no_negative_zero() -> None:
    y = qsim.parse("int4")(torch.tensor([float("nan"), -0.0, -0.4]))

    assert y[0].isnan()
    assert not y[1:].signbit().any()


def test_presets_cover_2_to_16_bits() -> None:
    assert [qsim.parse(f"int{bits}").bits for bits in range(2, 17)] == list(range(2, 17))
    assert qsim.parse("int4").max == 7
