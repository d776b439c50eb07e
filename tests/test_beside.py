"""Two factors beside a weight: their product is added before the result is rounded, on every way through a site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qsim_core as qsim
from qsim_core.matmuls.low_rank import LowRank
from qsim_core.testing import both_ways as both_ways


class Split(qsim.Transform):
    """Takes 2 from the first column of every weight and leaves it beside."""

    name = "split"

    def apply(self, model: nn.Module, context: Any) -> None:
        for weight in context.weights():
            rows, columns = weight.parameter.shape
            weight.parameter[:, 0] -= 2
            down = torch.zeros(1, columns, dtype=torch.bfloat16)
            down[0, 0] = 2
            weight.site.beside = LowRank(down, torch.ones(rows, 1, dtype=torch.bfloat16))
            context.report(weight.name, before=1.0, after=0.0)


class Double(qsim.Transform):
    """Doubles every weight."""

    name = "double"

    def apply(self, model: nn.Module, context: Any) -> None:
        for weight in context.weights():
            weight.parameter.mul_(2)


def layer() -> nn.Linear:
    made = nn.Linear(2, 1)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[2.125, 7.0]]))
        made.bias.fill_(0.5)
    return made


X = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
Y = [[9.5], [4.5]]
"""0.125 is half a step of 1/4, and is rounded to 0: 7 + 2 + 0.5, and 4 + 0.5."""


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("arithmetic", ["auto", "float32", "chunked(fp16, 64)"])
def test_the_product_of_the_factors_is_added(arithmetic: str) -> None:
    model = layer()

    simulation = qsim.simulate(
        model, weights="tensor(int3)", activations="token(int8)", arithmetic=arithmetic, transforms=[Split()], example=X
    )

    assert torch.allclose(model(X), torch.tensor(Y), atol=0.02)
    assert simulation.audit().sites[0].notes == ["beside its weight stand two factors of rank 1 in bfloat16"]


def test_the_sum_is_rounded_and_not_the_product_alone() -> None:
    model = layer()

    qsim.simulate(model, weights="tensor(int3)", outputs="cast(int8)", transforms=[Split()], example=X)

    assert model(X).tolist() == [[10.0], [4.0]]


def test_a_model_that_computes_without_quantizers_computes_its_function() -> None:
    model, exact = layer(), layer()(X)
    simulation = qsim.simulate(model, weights="tensor(int3)", transforms=[Split()], example=X)

    with simulation.unquantized(lambda site, call: call.exact()):
        assert torch.equal(model(X), exact)


def test_restore_takes_the_factors_away() -> None:
    model, exact = layer(), layer()(X)

    qsim.simulate(model, weights="tensor(int3)", transforms=[Split()], example=X).restore()

    assert torch.equal(model(X), exact)


def test_weights_are_not_saved_without_their_factors() -> None:
    simulation = qsim.simulate(layer(), weights="tensor(int3)", transforms=[Split()], example=X)

    with pytest.raises(qsim.QsimError, match=r"^a transform has left two factors of rank 1 in bfloat16 at weight, and"):
        simulation.folded_state_dict()


def test_a_split_weight_is_not_changed_by_a_later_transform() -> None:
    message = r"^double would change weight, which an earlier transform has .*split.*; put double before that one$"

    with pytest.raises(qsim.RecipeError, match=message):
        qsim.simulate(layer(), weights="tensor(int3)", transforms=[Split(), Double()], example=X)
