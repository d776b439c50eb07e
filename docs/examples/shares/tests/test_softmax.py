"""Eight-bit shares against a loop over numbers."""

import math

import torch
from qsim_shares import Shares

import qsim_core as qsim


def test_shares_are_those_of_whole_exponentials():
    x = torch.tensor([[0.0, -1.0, -2.0, -9.0]])
    exponentials = [round(255 * math.exp(value)) for value in x[0].tolist()]
    expected = [round(255 * each / sum(exponentials)) / 255 for each in exponentials]

    model = torch.nn.Softmax(-1)
    with qsim.simulate(model, {"operations": {"softmax": Shares()}}):
        found = model(x)

    assert torch.allclose(found, torch.tensor([expected]), atol=1e-7)
