"""The codes of an overwritten weight take its place, and nothing but memory tells the difference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from qsim_fast.kernels import native
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.formats.coded_parameter import CodedParameter
from qsim_core.sites.site import Site

FORMATS = {
    "abfp": qsim.Recipe(weights="abfp(int4)", activations="abfp(int8)", arithmetic="int8_blocks"),  # type: ignore[arg-type]
    "nvfp4": qsim.Recipe(weights="nvfp4", activations="nvfp4", arithmetic="int8_blocks"),  # type: ignore[arg-type]
    "int8": qsim.Recipe(weights="int4", activations="int8", arithmetic="int8"),  # type: ignore[arg-type]
}
X = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1))
everywhere = pytest.mark.parametrize("recipe", FORMATS.values(), ids=FORMATS)


class Once(nn.Module):
    """One layer, whose weight is large enough for codes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(1024, 512, bias=False)
        self.layer.weight = nn.Parameter(torch.randn(512, 1024, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.fixture(autouse=True)
def evaluating() -> Iterator[None]:
    with torch.no_grad(), native.only(True):
        yield


def simulated(recipe: qsim.Recipe, keep: bool = False) -> tuple[qsim.Simulation, Tensor]:
    """A simulation after two forwards, and the output of the second."""
    simulation = qsim.simulate(Once().eval(), recipe, example=X, keep=keep)
    simulation.model(X)
    return simulation, simulation.model(X)


def codes(simulation: qsim.Simulation) -> Any:
    weight = simulation.model.layer.weight
    return weight.codes if isinstance(weight, CodedParameter) else None


@everywhere
def test_codes_give_the_bits_of_a_weight_that_is_kept_beside(recipe: qsim.Recipe) -> None:
    simulation, y = simulated(recipe)

    assert codes(simulation) is not None and torch.equal(y, simulated(recipe, keep=True)[1])


@everywhere
def test_a_later_forward_multiplies_the_same_codes(recipe: qsim.Recipe) -> None:
    simulation, _ = simulated(recipe)
    before = codes(simulation)

    simulation.model(X)

    assert codes(simulation) is before


@everywhere
def test_the_state_of_the_model_has_the_quantized_values(recipe: qsim.Recipe) -> None:
    simulation, _ = simulated(recipe)

    read = simulation.model.state_dict()["layer.weight"]

    assert torch.equal(read, simulated(recipe, keep=True)[0].folded_state_dict()[0]["layer.weight"])
    assert torch.equal(read, simulation.folded_state_dict()[0]["layer.weight"])


@everywhere
def test_a_weight_that_was_read_is_coded_again(recipe: qsim.Recipe) -> None:
    simulation, y = simulated(recipe)
    simulation.model.state_dict()
    read = codes(simulation)
    simulation.refresh()

    assert read is None and torch.equal(simulation.model(X), y) and codes(simulation) is not None


@everywhere
def test_an_audit_leaves_the_codes(recipe: qsim.Recipe) -> None:
    simulation, _ = simulated(recipe)
    before = codes(simulation)

    (site,) = simulation.audit().sites

    assert codes(simulation) is before and site.arithmetic == str(recipe.arithmetic)


@everywhere
def test_a_changed_weight_is_quantized_again(recipe: qsim.Recipe) -> None:
    simulation, y = simulated(recipe)

    simulation.model.layer.weight.mul_(2)

    assert torch.equal(simulation.model(X), 2 * y) and codes(simulation) is not None


@everywhere
def test_a_copied_model_gives_the_same_bits(recipe: qsim.Recipe) -> None:
    simulation, y = simulated(recipe)

    assert torch.equal(copy.deepcopy(simulation.model)(X), y)


@everywhere
def test_a_gradient_flows_to_the_input(recipe: qsim.Recipe) -> None:
    simulation, _ = simulated(recipe)
    with torch.enable_grad():
        simulation.model(x := X.clone().requires_grad_()).sum().backward()

    assert torch.allclose(x.grad[0], simulation.model.layer.weight.sum(0), rtol=1e-4, atol=1e-4)  # type: ignore[index]


def test_a_weight_on_its_grid_is_coded_too_and_stays_final() -> None:
    recipe, model = FORMATS["abfp"], Once().eval()
    weights = qsim.parse("abfp(int4)")
    final = {"layer.weight": weights.scales(model.layer.weight)}
    model.layer.weight.copy_(weights.quantize(model.layer.weight))
    simulation = qsim.simulate(model, recipe, example=X, final=final, keep=False)
    found = simulation.model(X), simulation.model(X)
    there = codes(simulation)

    model.layer.weight.add_(1)

    assert there is not None and torch.equal(*found) and torch.equal(found[0], simulated(recipe)[1])
    with pytest.raises(qsim.QsimError, match="has changed since a transform"):
        simulation.model(X)


def test_a_second_use_is_refused() -> None:
    simulation, _ = simulated(FORMATS["abfp"])
    simulation.model.forward = lambda x: x @ simulation.model.layer.weight.T @ simulation.model.layer.weight

    with pytest.raises(qsim.QsimError, match=r"layer\.weight is multiplied along two axes and was overwritten"):
        simulation.model(X)


def test_the_original_cannot_be_restored() -> None:
    with pytest.raises(qsim.QsimError, match="the original weights are gone"):
        simulated(FORMATS["abfp"])[0].restore()


def test_an_observer_is_shown_the_values() -> None:
    simulation, _ = simulated(FORMATS["abfp"])
    shown: list[Tensor] = []

    def note(site: Site, role: str, before: Tensor, after: Tensor, quantizer: Any) -> None:
        shown.extend([before, after] if role == "weight" else [])

    simulation.audit(observer=note)

    assert all(torch.equal(rows, simulation.model.layer.weight) for rows in shown) and len(shown) == 2
