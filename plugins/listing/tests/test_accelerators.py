"""Accelerators give the reference's bits or decline: `qsim plugins --check` compares them (test_check.py)."""

from __future__ import annotations

from typing import Any

import pytest
import qsim_int
import torch
from qsim_listing.accelerator_check import disagreements
from torch import Tensor

import qsim_core as qsim
from qsim_core.formats.accelerator import accelerated_by


@pytest.fixture(scope="module")
def integers() -> qsim.Host:
    """A host without plugins but that of integers. `qsim plugins --check` compares all quantizers: test_check.py."""
    host = qsim.Host(discover=False)
    host.register(qsim_int, name="int")
    return host


def reference(quantizer: Any, x: Tensor) -> Tensor:
    with accelerated_by():
        return quantizer.quantize(x)  # type: ignore[no-any-return]


class Declining:
    """Leaves everything to the reference."""

    def quantize(self, quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> None:
        return None


class OneUlpOff(Declining):
    """Wrong in one value of one scheme, by one unit in the last place."""

    def quantize(self, quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> Any:
        if str(quantizer) != "token(int8)" or scales is not None or x.dtype != torch.float32:
            return None
        y = reference(quantizer, x)
        y[0, 0] = torch.nextafter(y[0, 0], torch.tensor(torch.inf))
        return y


class Failing(Declining):
    def quantize(self, quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> Any:
        raise ValueError("no such instruction")


def test_an_accelerators_result_is_used() -> None:
    class Three(Declining):
        def quantize(self, quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> Any:
            return torch.full_like(x, 3.0)

    with accelerated_by(Declining(), Three()):
        assert qsim.parse("token(int8)").quantize(torch.zeros(1, 2)).tolist() == [[3.0, 3.0]]  # type: ignore[attr-defined]


def test_without_an_accelerator_the_reference_computes() -> None:
    assert reference(qsim.parse("int8"), torch.tensor([[2.4, 300.0]])).tolist() == [[2.0, 127.0]]


def test_the_comparison_names_the_quantizer_that_is_wrong_by_one_ulp(integers: qsim.Host) -> None:
    with accelerated_by(OneUlpOff()):
        (message,) = disagreements(integers, "OneUlpOff")

    assert message.startswith("token(int8), of float32: 1 of 3600 values differ")


def test_an_accelerator_that_raises_is_an_answer(integers: qsim.Host) -> None:
    with accelerated_by(Failing()):
        messages = disagreements(integers, "Failing")

    assert "int8, of float32: ValueError: no such instruction" in messages


def test_one_that_declines_everything_is_right(integers: qsim.Host) -> None:
    with accelerated_by(Declining()):
        assert disagreements(integers, "Declining") == []
