"""The size of each product against torch's own counter of floating-point operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import qsim_core as qsim

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(12, 7), X),
    "a vector": (nn.Linear(12, 7), X[0, 0]),
    "heads": (Calls(lambda x: x @ x.mT), X),
    "a matrix for all": (Calls(lambda x: x @ x[0].mT), X),
    "addmm": (Calls(lambda x: torch.addmm(x[0, 0, :5], x[0], x[1].mT)), X),
    "attention": (
        Calls(lambda x: F.scaled_dot_product_attention(x.view(1, 6, 5, 4), x.view(1, 6, 5, 4), x.view(1, 6, 5, 4))),
        X,
    ),
    "einsum of heads": (Calls(lambda x: torch.einsum("bqhd,bkhd->bhqk", x.view(2, 5, 3, 4), x.view(2, 5, 3, 4))), X),
    "einsum with an ellipsis": (Calls(lambda x: torch.einsum("...qd,...kd->...qk", x, x)), X),
    "conv1d": (nn.Conv1d(5, 8, 3, padding=1, stride=2), X),
    "conv2d of groups": (nn.Conv2d(4, 8, 3, groups=2), X.view(1, 4, 5, 6)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), X.view(1, 4, 5, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_multiplications_are_those_that_torch_counts(name: str) -> None:
    model, x = MODELS[name]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x)

    with qsim.simulate(model) as simulation:
        found = simulation.products(x)

    assert 2 * sum(product.multiplications for each in found.values() for product in each) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [(1, 10, 7, 12)]),
        ("heads", [(2, 5, 5, 12)]),
        ("a matrix for all", [(1, 10, 5, 12)]),
        ("attention", [(6, 5, 5, 4), (6, 5, 4, 5)]),
        ("einsum of heads", [(6, 5, 5, 4)]),
        ("conv2d of groups", [(2, 12, 4, 18)]),
        ("conv_transpose2d", [(2, 30, 27, 2)]),
    ],
)
def test_batch_m_n_and_k(name: str, expected: list[tuple[int, ...]]) -> None:
    model, x = MODELS[name]

    with qsim.simulate(model, activations="int8") as simulation:
        found = simulation.audit(x)

    assert [(p.batch, p.m, p.n, p.k) for site in found.sites for p in site.products] == expected


def test_a_model_without_memory_has_products_too() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(4096, 16384), nn.ReLU(), nn.Linear(16384, 4096)), torch.empty(1, 512, 4096)

    found = qsim.simulate(model, weights="int4", activations="int8").products(x)

    assert [product.multiplications for each in found.values() for product in each] == [512 * 4096 * 16384] * 2


def test_calls_of_one_size_are_counted() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer, nn.Linear(4, 2))

    found = qsim.simulate(model).products(torch.ones(3, 4))

    assert [[product.calls for product in each] for each in found.values()] == [[2], [1]]
