"""`torch.func` on a simulated model: gradients are its own, and `vmap` is refused where it hides weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import qsim_core as qsim

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)
RECIPE = {"weights": "int4", "activations": "int8"}


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
def test_grad_gives_the_gradients_of_backward(training: bool) -> None:
    model = perceptron().train(training)
    qsim.simulate(model, **RECIPE, example=X)

    found = grad(lambda held: functional_call(model, held, (X,)).square().mean())(parameters(model))
    model(X).square().mean().backward()

    assert all(torch.equal(found[name], parameter.grad) for name, parameter in model.named_parameters())


class Stacked(nn.Module):
    """Multiplies by a weight for each of several experts under `vmap`."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.Parameter(torch.ones(3, 16, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        each: Tensor = vmap(lambda expert: x @ expert)(self.experts)
        logits: Tensor = self.head(each.sum(0))
        return logits


def ensemble(model: nn.Module) -> None:
    states, _ = stack_module_state([perceptron(), perceptron()])
    vmap(lambda held: functional_call(model, held, (X,)))(states)


def gradients_of_samples(model: nn.Module) -> None:
    loss = grad(lambda held, x: functional_call(model, held, (x,)).square().mean())
    vmap(loss, in_dims=(None, 0))(parameters(model), X[:, None])


@pytest.mark.parametrize("way", [ensemble, gradients_of_samples])
def test_vmap_of_a_simulated_model_is_refused(way: Callable[[nn.Module], None]) -> None:
    model = perceptron()
    qsim.simulate(model, **RECIPE, example=X)

    with pytest.raises(qsim.QsimError, match=r"^a linear in 0 runs under torch.func.vmap, which hides its operands"):
        way(model)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_the_inputs_of_layers_gives_the_numbers_of_each() -> None:
    model = perceptron()

    with qsim.simulate(model, **RECIPE, example=X), torch.no_grad():
        assert torch.allclose(vmap(model)(X), model(X), atol=1e-6)


def test_vmap_inside_a_model_is_refused_before_anything_is_quantized() -> None:
    with pytest.raises(qsim.QsimError, match=r"^a matmul in the model runs under torch.func.vmap"):
        qsim.simulate(Stacked(), weights="int4", example=X)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "recipe", [RECIPE, {"activations": "tensor(int8, static=true)"}, {"weights": "int4", "transforms": ["gptq"]}]
)
def test_what_vmap_hides_cannot_be_looked_at(recipe: dict[str, Any]) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(X.shape[-1], 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = vmap(self.layer)(x)
            return y

    with pytest.raises(
        qsim.QsimError, match=r"^a linear in layer runs under torch.func.vmap, which hides its operands"
    ):
        qsim.simulate(Inner(), **recipe, example=X, calibration=[X]).audit()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch scripts its own derivatives at their first use
@pytest.mark.parametrize(
    "derivative", [lambda f, x: torch.func.jvp(f, (x,), (x,)), lambda f, x: torch.func.jacfwd(f)(x)]
)
def test_forward_mode_derivatives_are_refused(derivative: Any) -> None:
    model, x = torch.nn.Linear(8, 4), torch.linspace(-1, 1, 8)
    qsim.simulate(model, weights="int8", activations="int8", example=x)

    with pytest.raises(qsim.QsimError, match="no forward-mode derivatives"):
        derivative(model, x)
