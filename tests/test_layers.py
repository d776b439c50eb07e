"""A linear layer that comes again is computed by the plan of its first call, as long as everything stands as it did."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.matmuls.operators import OPS


class Rounds(qsim.Quantizer):
    """Rounds to whole multiples of a step."""

    name = "rounds_to_a_step"
    step: float

    def quantize(self, x: Tensor) -> Tensor:
        return (x / self.step).round() * self.step


X = torch.linspace(-1, 1, 12).view(3, 4)


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4)).eval()


def expected(weight: Tensor, bias: Tensor, step: float) -> Tensor:
    return nn.functional.linear((X / step).round() * step, weight, bias)


def test_a_later_call_reads_no_arguments_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = layer(), list[object]()
    qsim.simulate(model, weights=Rounds(step=0.5), example=X)
    first = model(X)
    read = type(OPS[nn.functional.linear]).read
    monkeypatch.setattr(type(OPS[nn.functional.linear]), "read", lambda *call: reads.append(call) or read(*call))

    assert torch.equal(model(X), first)
    assert reads == []


@torch.no_grad()
def test_another_quantizer_at_the_site_is_used() -> None:
    model = layer()
    simulation = qsim.simulate(model, activations=Rounds(step=0.5), example=X)
    model(X)

    simulation.sites.table["0"].fixed["input"] = Rounds(step=0.25)

    assert torch.equal(model(X), expected(model[0].weight, model[0].bias, 0.25))


@torch.no_grad()
def test_another_weight_at_the_module_is_used_and_the_first_one_is_freed() -> None:
    model = layer()
    qsim.simulate(model, activations=Rounds(step=0.5), example=X)
    model(X)
    first, other = weakref.ref(model[0].weight), nn.Parameter(torch.eye(4))

    model[0].weight = other

    assert torch.equal(model(X), expected(other, model[0].bias, 0.5))
    assert first() is None


@torch.no_grad()
def test_a_plan_keeps_no_input() -> None:
    model, x = layer(), X.clone()
    qsim.simulate(model, weights=Rounds(step=0.5), example=X)
    model(x)

    seen = weakref.ref(x)
    del x

    assert seen() is None


@torch.no_grad()
def test_an_input_that_is_a_parameter_is_found_anew() -> None:
    model = layer()
    model.query = nn.Parameter(X.clone())
    simulation = qsim.simulate(model, weights=Rounds(step=0.5), example=X)
    model(X)

    model(model.query)

    assert [site.calls for site in simulation.sites.table.values()] == [2]


@torch.no_grad()
def test_a_copy_of_the_model_has_plans_of_its_own() -> None:
    model = layer()
    qsim.simulate(model, activations=Rounds(step=0.5), example=X)
    model(X)
    other = copy.deepcopy(model)

    other[0].weight.fill_(1.0)

    assert torch.equal(other(X), expected(other[0].weight, model[0].bias, 0.5))
    assert torch.equal(model(X), expected(model[0].weight, model[0].bias, 0.5))


def test_a_call_that_was_observed_leaves_no_observer() -> None:
    model, seen = layer(), list[str]()
    simulation = qsim.simulate(model, weights=Rounds(step=0.5), example=X)
    simulation.audit(observer=lambda site, role, before, after, quantizer: seen.append(role))
    audited = len(seen)

    model(X)

    assert audited and len(seen) == audited


def test_a_format_passes_gradients_of_values_that_bfloat16_holds() -> None:
    x = torch.tensor([1.0, torch.finfo(torch.bfloat16).max, torch.inf, torch.nan], dtype=torch.bfloat16)

    assert qsim.parse("bf16").passes(x).tolist() == [True, True, False, False]  # type: ignore[union-attr]
