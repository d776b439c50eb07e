"""Tensors without numbers, without elements, or of another kind: left alone and named, or one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.none = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x)) + self.none(x).sum()


def products(*sizes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), *(nn.Linear(16, size) for size in sizes)).eval()


@pytest.mark.parametrize("arithmetic", ["auto", "int16(overflow=saturate)"])
def test_on_the_meta_device_nothing_is_measured(arithmetic: str) -> None:
    model, x = products(4).to("meta"), X.to("meta")

    simulation = qsim.simulate(model, weights="int4", activations="int8", arithmetic=arithmetic, example=x)

    assert model(x).shape == (4, 4)
    assert [(site.weight, site.measured) for site in simulation.audit().sites] == [("channel(int4)", {})] * 2


@pytest.mark.parametrize(
    "recipe",
    [{"weights": "int4", "transforms": ["hadamard"]}, {"weights": "int4", "activations": "tensor(int8, static=true)"}],
)
def test_what_needs_numbers_is_refused_on_the_meta_device(recipe: dict[str, Any]) -> None:
    model, x = products(4).to("meta"), X.to("meta")

    with pytest.raises(qsim.DataError, match=r"^a batch is on the meta device, which holds no numbers; transforms and"):
        qsim.simulate(model, recipe, example=x, calibration=[x])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("transform", ["hadamard", "bias_correction", "gptq", "awq", "smoothquant"])
def test_a_layer_without_outputs_hinders_no_transform(transform: str) -> None:
    recipe = {"weights": "int4", "activations": "int8", "transforms": [transform]}

    simulation = qsim.simulate(Residual().eval(), recipe, example=X, calibration=[X.repeat(8, 1)])

    assert simulation.reports


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_products_of_nested_tensors_are_left_alone_and_named(layout: torch.layout) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            nested = torch.nested.as_nested_tensor([*self.first(x).split([1, 3])], layout=layout)
            return self.second(nested).to_padded_tensor(0.0)

    audit = qsim.simulate(Nested().eval(), weights="int4", example=X).audit()

    assert (audit.covered, audit.uncovered) == (1, ["second:linear"])


@pytest.mark.parametrize(
    ("model", "example", "what"),
    [
        (nn.LSTM(16, 16), X, r"\w+"),
        (nn.Linear(16, 4, dtype=torch.complex64), X.to(torch.complex64), "addmm"),
        (nn.Linear(16, 4), X.to_sparse(), r"\w+"),
    ],
)
def test_a_quantizer_that_reaches_no_site_names_what_has_none(model: nn.Module, example: Tensor, what: str) -> None:
    with pytest.raises(qsim.RecipeError, match=rf"reached no site of this model; products that have no site: :{what}"):
        qsim.simulate(model.eval(), weights="int4", example=example)


def test_transforms_take_a_model_with_a_sparse_parameter() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edges = nn.Parameter(torch.eye(4).to_sparse())
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.sparse.mm(self.edges, x))  # type: ignore[no-any-return]

    model, x = Graph(), torch.linspace(-1, 1, 64).reshape(4, 16)
    exact = model(x)

    simulation = qsim.simulate(model, weights="int4", transforms=["gptq"], calibration=[x] * 4)

    assert not torch.equal(model(x), exact)
    assert torch.equal(simulation.restore()(x), exact)


class Named(Tensor):
    """A class of its own that changes nothing."""


def test_a_parameter_of_a_class_of_its_own_is_a_weight() -> None:
    model, x = nn.Sequential(nn.Linear(16, 4)), torch.linspace(-1, 1, 64).reshape(4, 16)
    plain = model[0].weight.detach().clone()
    model[0].weight = nn.Parameter(plain.as_subclass(Named))

    simulation = qsim.simulate(model, weights="int4", example=x)

    rounded = qsim.parse("channel(int4)")(plain)
    assert torch.equal(model(x), torch.nn.functional.linear(x, rounded, model[0].bias))
    assert torch.equal(simulation.folded_state_dict()[0]["0.weight"], rounded)


@pytest.mark.parametrize("view", [Tensor.t, lambda w: w[:8], lambda w: w.double().float(), lambda w: w.tril()])
def test_so_is_a_view_of_it_and_what_is_computed_from_it(view: Any) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 256).reshape(16, 16).sin().as_subclass(Named))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, view(self.w))

    model = Views()
    rounded = qsim.parse("channel(int4)")(view(model.w.detach().as_subclass(Tensor)))

    qsim.simulate(model, weights="int4", example=X)

    assert torch.allclose(model(X), nn.functional.linear(X, rounded), atol=1e-6)
