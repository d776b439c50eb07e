"""A parameter that holds codes is, to all other code, a parameter with their values."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsim_core.formats.coded_parameter import CodedParameter


@dataclass
class Halves:
    """Codes of which each stands for its half."""

    codes: Tensor

    def values(self) -> Tensor:
        return self.codes.float() / 2


CODES = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)
VALUES = CODES / 2


def coded() -> CodedParameter:
    return CodedParameter(nn.Parameter(torch.zeros(2, 3)), Halves(CODES))


def test_its_shape_and_dtype_are_told_without_its_values() -> None:
    parameter = coded()

    told = parameter.shape, parameter.dtype, parameter.device.type, parameter.numel(), parameter.requires_grad

    assert told == ((2, 3), torch.float32, "cpu", 6, True) and parameter.codes is not None


@pytest.mark.parametrize(
    "read",
    [
        lambda p: F.linear(torch.eye(3), p).T,
        lambda p: p + 0,
        lambda p: p.data,
        lambda p: p.detach(),
        lambda p: copy.deepcopy(p),
        lambda p: pickle.loads(pickle.dumps(p)),
    ],
)
def test_who_reads_it_gets_the_values(read: Callable[[Any], Tensor]) -> None:
    with torch.no_grad():
        assert torch.equal(read(coded()), VALUES)


@pytest.mark.parametrize("write", [lambda p: p.mul_(3), lambda p: p.data.mul_(3), lambda p: p.detach().t().mul_(3)])
def test_a_change_stays(write: Callable[[Any], Tensor]) -> None:
    parameter = coded()

    with torch.no_grad():
        write(parameter)

    assert torch.equal(parameter, 3 * VALUES) and parameter.codes is None


def test_its_gradient_is_that_of_a_parameter() -> None:
    parameter = coded()

    (parameter * torch.arange(6.0).view(2, 3)).sum().backward()

    assert torch.equal(parameter.grad, torch.arange(6.0).view(2, 3))  # type: ignore[arg-type]


def test_a_module_with_it_is_saved_loaded_and_converted() -> None:
    layer = nn.Linear(3, 2)
    layer.weight = coded()
    saved = layer.state_dict()["weight"]

    layer.load_state_dict({"weight": saved + 1, "bias": layer.bias})

    assert torch.equal(layer.double().weight, VALUES.double() + 1)
