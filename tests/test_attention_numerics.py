"""Attention is as exact as torch's where nothing in it is quantized, and is computed in float32 where something is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsim_core as qsim

HALVES = [torch.bfloat16, torch.float16]


class Attention(nn.Module):
    """Attention whose scores are large, as those of some language models: their product passes float16's largest."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.options = options
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        with torch.no_grad():
            self.q.bias.fill_(60.0)
            self.k.bias.fill_(60.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            *(layer(x).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v)), **self.options
        )


INPUT = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(20, 20).tril().bool()}])
def test_without_quantizers_attention_is_torchs_own(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = Attention(**options).to(dtype), INPUT.to(dtype)
    plain = model(x)

    simulation = qsim.simulate(model, example=x)

    assert torch.equal(model(x), plain)
    assert [(site.aliases, site.calls) for site in simulation.sites.table.values() if site.aliases] == [
        ([":qk"], 1),
        ([":pv"], 1),
    ]


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_alone_leave_attention_torchs_own(dtype: torch.dtype) -> None:
    model, x = Attention().to(dtype), INPUT.to(dtype)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (rounded.q, rounded.k, rounded.v):
            layer.weight.copy_(qsim.parse("channel(int8)")(layer.weight))

        qsim.simulate(model, weights="int8", example=x)

        assert torch.equal(model(x), rounded(x))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_where_something_is_quantized_products_are_computed_in_float32(
    options: dict[str, Any], dtype: torch.dtype, autocast: bool
) -> None:
    class Given(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=autocast):
                return F.scaled_dot_product_attention(q, k, v, **options)

    model = Attention().to(dtype)
    q, k, v = ((layer(INPUT.to(dtype))[:, None]).detach() for layer in (model.q, model.k, model.v))
    given = [x.float() for x in (q, k, v)] if autocast else [q, k, v]
    rounded = qsim.parse("token(int8)")(v.float().mT).mT
    exact = F.scaled_dot_product_attention(q.double(), k.double(), rounded.double(), **options)

    simulated = Given()
    with torch.no_grad(), qsim.simulate(simulated, {"values": "token(int8)"}, example=tuple(given)):
        found = simulated(*given)

    assert found.dtype == dtype
    assert (found.double() - exact).norm() < 0.01 * exact.norm()


def test_a_recipe_that_names_keys_needs_no_example_for_fused_attention() -> None:
    model = Attention()

    qsim.simulate(model, overrides={"*:qk": {"keys": "int4"}})

    assert not torch.equal(model(INPUT), Attention()(INPUT))
