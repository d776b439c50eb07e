"""A simulation shows the matmuls of the model as it is, and computes each of them under the recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.formats.quantizer import SiteQuantizer
from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """The second layer of the first one's result."""
        y: Tensor = self.second(self.first(x).relu())
        return y


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def test_the_model_as_it_is_goes_on_with_the_results_that_it_is_given() -> None:
    model = Two()
    exact = model(X)
    simulation = qsim.simulate(model, weights=torch.round, example=X)

    with simulation.unquantized(lambda site, call: call.exact() + (site.name == "second")):
        shifted = model(X)

    assert torch.equal(shifted, exact + 1)


def test_a_call_is_computed_under_the_recipe_on_exact_operands() -> None:
    model = Two()
    simulation = qsim.simulate(model, weights=torch.round, overrides={"second": {"outputs": torch.floor}}, example=X)
    tried = dict[str, Tensor]()

    def see(site: Site, call: Call) -> Any:
        tried[site.name] = simulation.tried(site, call)
        return call.exact()

    with simulation.unquantized(see):
        model(X)

    rounded = nn.functional.linear(model.first(X).relu(), model.second.weight.round(), model.second.bias).floor()
    assert torch.equal(tried["second"], rounded)


def test_another_quantizer_can_be_tried_in_the_place_of_one() -> None:
    model = Two()
    simulation = qsim.simulate(model, weights=torch.round, example=X)
    tried = list[Tensor]()

    class Zero(SiteQuantizer):
        def quantize(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    def see(site: Site, call: Call) -> Any:
        tried.append(simulation.tried(site, call, change=lambda quantizer: Zero()))
        return call.exact()

    with simulation.unquantized(see):
        model(X)

    assert torch.equal(tried[0], model.first.bias.expand(3, 8))


class Twice(qsim.Arithmetic):
    """Twice the product."""

    name = "twice"

    def multiply(self, left: qsim.QuantizedRows, right: qsim.QuantizedRows) -> Tensor:
        return 2 * left.values @ right.values.transpose(-1, -2)


def test_another_arithmetic_can_be_tried_in_the_place_of_the_sites() -> None:
    model = Two()
    simulation = qsim.simulate(model, example=X)
    tried = list[Tensor]()

    def see(site: Site, call: Call) -> Tensor:
        tried.append(simulation.tried(site, call, arithmetic=Twice()))
        return call.exact()

    with simulation.unquantized(see):
        model(X)

    assert torch.allclose(tried[0], 2 * X @ model.first.weight.T + model.first.bias)


def test_afterwards_the_model_is_quantized_again() -> None:
    model = Two()
    simulation = qsim.simulate(model, weights=torch.round, example=X)
    before = model(X)

    with simulation.unquantized(lambda site, call: call.exact()):
        assert not torch.equal(model(X), before)

    assert torch.equal(model(X), before)
