"""Tensors that a forward, or `simulate` itself, kept under `torch.inference_mode` can be used where gradients are recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qsim_core as qsim

RECIPES: dict[str, dict[str, Any]] = {
    "weights": {"weights": "abfp(int4)"},
    "activations": {"activations": "abfp(int8)"},
    "both": {"weights": "int8", "activations": "int8"},
    "lowered": {"weights": "mxfp4", "activations": "mxfp4", "outputs": "bf16"},
    "static": {"weights": "int4", "activations": "tensor(int8, static=true, symmetric=false)"},
    "learned": {"weights": "channel(int4, gradient=lsq)", "activations": "tensor(int8, gradient=lsq)"},
    "stochastic": {"weights": "int(bits=4, rounding=stochastic)", "activations": "int(bits=4, rounding=stochastic)"},
    "hadamard": {"weights": "int4", "activations": "int8", "transforms": ["hadamard"]},
    "gptq": {"weights": "int4", "transforms": ["gptq"]},
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("inside", ["forward", "simulate"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_trains_after_it(recipe: str, inside: str, keep: bool, make: Any, ids: torch.Tensor) -> None:
    model, example = make("llama"), {"input_ids": ids}
    if "gptq" in str(RECIPES[recipe]):
        example = {"input_ids": ids.repeat(8, 4)}
    with torch.inference_mode(inside == "simulate"):
        qsim.simulate(model, **RECIPES[recipe], example=example, calibration=[example], keep=keep)
    with torch.inference_mode():
        model(**example)

    for one in (model.eval(), model.train()):
        one(**example, labels=example["input_ids"]).loss.backward()

    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None


@pytest.mark.parametrize("transform", ["gptq", "gptaq"])
def test_a_model_that_was_made_in_it_is_rounded_and_restored(transform: str) -> None:
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_(False)
    batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    before = model(batch)

    simulation = qsim.simulate(model, weights="int4", transforms=[transform], calibration=[batch])

    assert not torch.equal(model(batch), before)
    assert torch.equal(simulation.restore()(batch), before)
