"""The fused dot product in Triton has the reference's bits: on a GPU, and in Triton's interpreter without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qsim_accumulators.fused import OUTPUTS, kernel_on
from qsim_accumulators.terms import Terms
from torch import Tensor

import qsim_core as qsim

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESETS = {"hopper_fp8": "e4m3", "ada_fp8": "e5m2", "hopper": "bf16", "turing": "fp16"}
QUICK = {"ada_fp8", "turing"}
"""A narrow register and a wide one; the others differ in their widths."""

pytest.importorskip("triton", reason="Triton is made for Linux")


def operand(number_format: Any, rows: int, seed: int) -> Tensor:
    """Values of a format over all of its exponents, with zeros and the largest."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, 150, generator=generator) * 2.0 ** torch.randint(-12, 12, (rows, 150), generator=generator)
    wide[0], wide[1, ::3] = 3e4, 0.0
    found: Tensor = number_format.quantize(wide)
    return torch.where(found.isfinite(), found, 0.0)


@pytest.mark.parametrize("preset", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PRESETS])
def test_triton_and_the_reference_give_the_same_bits(preset: str) -> None:
    unit: Any = qsim.Host().parse(preset, qsim.Arithmetic)
    number_format = qsim.parse(PRESETS[preset]).rounds_to
    left, right = (Terms.of(operand(number_format, rows, rows), number_format) for rows in (5, 70))
    kernel = kernel_on(torch.device(DEVICE))
    assert kernel is not None
    given = (Terms(x.to(DEVICE), of_x.to(DEVICE), digits) for x, of_x, digits in (left, right))

    found = kernel(*given, unit.n, unit.fraction, OUTPUTS[unit.output].digits).cpu()

    assert torch.equal(found, unit._matrix(left, right))
