"""A weight that changes, in whatever way, is quantized again; what cannot be quantized again is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, prune, vector_to_parameters

import qsim_core as qsim
from qsim_core.snapshots import sample

X = torch.linspace(-1, 1, 6 * 32).reshape(6, 32)

CALIBRATION = [torch.randn(64, 32, generator=torch.Generator().manual_seed(0))]


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def afresh(model: nn.Module, **recipe: Any) -> Tensor:
    """Compute the output of another model with the same weights, simulated now."""
    other = perceptron()
    other.load_state_dict(model.state_dict())
    qsim.simulate(other, **recipe)
    with torch.no_grad():
        output: Tensor = other(X)
    return output


def trained(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.train()(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def low_rank(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, 1) @ torch.linspace(-1, 1, columns)[None]


WAYS: dict[str, Callable[[nn.Sequential], object]] = {
    "a fused optimizer": lambda m: trained(m, torch.optim.AdamW(m.parameters(), lr=0.1, fused=True)),
    "a foreach optimizer": lambda m: trained(m, torch.optim.AdamW(m.parameters(), lr=0.1, foreach=True)),
    "plain SGD": lambda m: trained(m, torch.optim.SGD(m.parameters(), lr=3.0)),
    "an average by data.copy_": lambda m: [p.data.copy_(p.data * 0.9 + 0.3) for p in m.parameters()],
    "a merged adapter": lambda m: m[0].weight.data.add_(low_rank(64, 32)),
    "one row": lambda m: m[0].weight.data[-1].mul_(-3),
    "one column": lambda m: m[2].weight.data[:, -1].mul_(-3),
    "numpy": lambda m: m[0].weight.detach().numpy().__imul__(2),
    "another memory": lambda m: setattr(m[0].weight, "data", torch.flip(m[0].weight.data, [0])),
    "the memory itself": lambda m: m[0].weight.untyped_storage().copy_(perceptron(1)[0].weight.untyped_storage()),
    "views of one vector": lambda m: vector_to_parameters(-parameters_to_vector(m.parameters()), m.parameters()),
    "another order in memory": lambda m: setattr(m[0].weight, "data", m[0].weight.data.mul(2).t().contiguous().t()),
    "another parameter": lambda m: setattr(m[0], "weight", perceptron(1)[0].weight),
    "load_state_dict": lambda m: m.load_state_dict(perceptron(1).state_dict()),
    "load_state_dict by assignment": lambda m: m.load_state_dict(perceptron(1).state_dict(), assign=True),
    "under inference_mode": lambda m: torch.inference_mode()(lambda: m[0].weight.neg_())(),
    "one element without a gradient": lambda m: torch.no_grad()(lambda: m[0].weight[3, 5].fill_(9))(),
}
RECIPES = {
    "weights": {"weights": "int4"},
    "int8": {"weights": "int8", "activations": "int8"},
    "bf16": {"weights": "mxfp4", "activations": "mxfp4", "outputs": "bf16"},
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_an_evaluation_sees_the_weights_that_the_model_holds(way: str, recipe: str, keep: bool) -> None:
    model = perceptron()
    simulation = qsim.simulate(model, **RECIPES[recipe], example=X, keep=keep)
    with torch.no_grad():
        before = model(X)

    WAYS[way](model)
    expected = afresh(model, **RECIPES[recipe])

    with torch.no_grad():
        assert torch.equal(model(X), expected)
    assert not torch.equal(before, expected)
    folded, left = simulation.folded_state_dict()
    assert torch.equal(
        folded["0.weight"], qsim.parse(str(simulation.audit().sites[0].weight))(model[0].weight.detach())
    )
    assert left == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_are_compared_too(dtype: torch.dtype) -> None:
    model = nn.Linear(32, 64, bias=False).to(dtype).eval()
    qsim.simulate(model, weights="int4")
    with torch.no_grad():
        model(X.to(dtype))

        model.weight.data.neg_()

        assert torch.equal(model(torch.eye(32, dtype=dtype)).T, qsim.parse("channel(int4)")(model.weight))


@pytest.mark.parametrize("keep", [True, False])
def test_refresh_finds_a_single_element(keep: bool) -> None:
    model = perceptron()
    simulation = qsim.simulate(model, weights="int4", example=X, keep=keep)
    with torch.no_grad():
        model(X)
        for weight in (model[0].weight, model[2].weight):
            weight.data[7, 11] = 5.0
        expected = afresh(model, weights="int4")

        simulation.refresh()

        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48), (8, 12, 20), (16, 3, 3, 3), (24, 1, 7), (5,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_sample_has_elements_of_all_rows_and_columns(shape: tuple[int, ...], transposed: bool) -> None:
    x = torch.zeros(shape[::-1]).permute(*range(len(shape))[::-1]) if transposed else torch.zeros(shape)

    seen = sample(x)
    for axis, size in enumerate(shape):
        for index in range(size):
            before = sample(x).clone()
            x.select(axis, index).add_(1)
            assert not torch.equal(before, sample(x)), (axis, index)

    assert len(seen) <= max(64, 2 * max(shape) + x.numel() // 4)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(ids))
        return logits


@pytest.mark.parametrize("keep", [True, False])
def test_a_weight_that_is_tied_later_leaves_the_table_as_it_is(keep: bool) -> None:
    model, ids = Language().eval(), torch.arange(10)[None]
    simulation = qsim.simulate(model, weights="int3", example=ids, keep=keep)
    with torch.no_grad():
        model(ids)
        expected = model.table(ids) @ qsim.parse("channel(int3)")(model.table.weight).T

        model.head.weight = model.table.weight

        assert all(torch.equal(model(ids), expected) for _ in range(2))
    assert simulation.folded_state_dict()[1] == ["head.weight"]


def test_a_weight_that_is_untied_later_is_folded() -> None:
    model, ids = Language().eval(), torch.arange(10)[None]
    model.head.weight = model.table.weight
    simulation = qsim.simulate(model, weights="int3", example=ids)

    model.head.weight = nn.Parameter(model.table.weight.detach() * 2)

    folded, left = simulation.folded_state_dict()
    assert torch.equal(folded["head.weight"], qsim.parse("channel(int3)")(model.head.weight.detach()))
    assert left == []


@pytest.mark.parametrize(
    ("put", "remove"),
    [
        (parametrizations.weight_norm, parametrize.remove_parametrizations),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), prune.remove),
    ],
)
def test_a_weight_that_is_computed_no_more_is_folded(put: Any, remove: Any) -> None:
    model = perceptron()
    put(model[0])
    simulation = qsim.simulate(model, weights="int4", example=X)

    remove(model[0], "weight")

    with torch.no_grad():
        assert torch.equal(model(X), afresh(model, weights="int4"))
    folded, left = simulation.folded_state_dict()
    assert torch.equal(folded["0.weight"], qsim.parse("channel(int4)")(model[0].weight.detach()))
    assert left == []


@pytest.mark.parametrize("way", ["one row", "a fused optimizer"])
def test_a_weight_that_a_transform_made_final_may_not_change(way: str) -> None:
    model = perceptron()
    qsim.simulate(model, weights="int4", transforms=["gptq"], calibration=CALIBRATION, example=X)
    model(X)

    WAYS[way](model)

    with pytest.raises(qsim.QsimError, match=r"^0.weight has changed since a transform put it on its grid; load"):
        model(X)


def test_final_weights_may_move_and_be_copied() -> None:
    model = perceptron()
    qsim.simulate(model, weights="int4", transforms=["gptq"], calibration=CALIBRATION, example=X)
    with torch.no_grad():
        expected = model(X)

        assert torch.equal(copy.deepcopy(model)(X), expected)
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        assert torch.equal(model(X), expected)
        assert torch.allclose(model.bfloat16()(X.bfloat16()).float(), expected, atol=0.1)


def test_steps_that_a_fused_optimizer_trains_are_seen() -> None:
    model = perceptron()
    simulation = qsim.simulate(model, weights="channel(int4, gradient=lsq)", example=X)
    with torch.no_grad():
        model(X)
    steps = [p for name, p in model.named_parameters() if "qsim_steps" in name]

    trained(model, torch.optim.AdamW(steps, lr=0.05, fused=True))

    other = perceptron()
    qsim.simulate(other, simulation.recipe, example=X, state=simulation.state_dict())
    with torch.no_grad():
        assert torch.equal(model(X), other(X))


class Twice(nn.Module):
    """Two layers with one input, which changes between them in a way that torch does not count."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.change = nn.Linear(32, 8), nn.Linear(32, 8), change

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone()
        q = self.q(x)
        self.change(x)
        return q, self.k(x)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("change", [lambda x: x.data.mul_(-2), lambda x: x.numpy().__imul__(-2)])
def test_an_input_that_was_written_between_two_layers_is_quantized_again(change: Any, recipe: str) -> None:
    model, other = Twice(change).eval(), Twice(lambda x: x.mul_(-2)).eval()
    for one in (model, other):
        qsim.simulate(one, **RECIPES[recipe], example=X)

    with torch.no_grad():
        assert torch.equal(model(X)[1], other(X)[1])


def test_gptq_sees_an_input_that_was_written_between_two_layers() -> None:
    model, other = Twice(lambda x: x.data.mul_(torch.arange(32.0))).eval(), Twice(lambda x: x.mul_(torch.arange(32.0)))
    for one in (model, other.eval()):
        qsim.simulate(one, weights="int4", transforms=["gptq"], calibration=CALIBRATION, example=X)

    assert torch.equal(model.k.weight, other.k.weight)
