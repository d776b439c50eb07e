"""Attention by tiles: a few heads, or a few queries, at a time give the numbers of all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qsim_fast.accelerator import Fast
from qsim_fast.kernels import native
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.formats.accelerator import accelerated_by


class Heads(nn.Module):
    """Attention of queries, keys and values [B, H, N, D], with two other products before it if they are given."""

    def __init__(self, causal: bool = False, grouped: bool = False) -> None:
        super().__init__()
        self.options = {"is_causal": causal, "enable_gqa": grouped}
        self.eval()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, other: Tensor | None = None) -> Tensor:
        if other is not None:
            return (other @ other) @ other
        return F.scaled_dot_product_attention(query, key, value, **self.options)  # type: ignore[arg-type]


class Block(nn.Module):
    """Self-attention of a transformer: four heads of queries, and of keys and values as many or two."""

    def __init__(self, key_heads: int = 4) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = nn.Linear(32, 8 * key_heads), nn.Linear(32, 8 * key_heads)
        self.eval()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def all_at_once(model: nn.Module, *given: Any) -> Tensor:
    """The output of the model without an accelerator: the reference computes all heads at once."""
    with accelerated_by(), torch.no_grad():
        return model(*given)  # type: ignore[no-any-return]


def multiplications(compute: Callable[[], object]) -> int:
    """The number of multiplications in torch's batched products of matrices."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        compute()
    shapes = [event.input_shapes[:2] for event in profile.function_events if event.name == "aten::bmm"]
    return sum(batch * rows * inner * right[-1] for (batch, rows, inner), right in shapes)


@pytest.mark.parametrize("name", ["multi_query", "kv once", "3-D"])
def test_heads_of_other_shapes_stay_together(name: str) -> None:
    shapes = {"multi_query": [(2, 4, 8, 16), (2, 1, 8, 16)], "kv once": [(2, 4, 8, 16), (1, 4, 8, 16)]}
    query, key = (torch.randn(shape) for shape in shapes.get(name, [(2, 4, 8, 16), (4, 8, 16)]))
    model = Heads()
    qsim.simulate(model, activations="token(int8)", example=(query, key, key))

    with accelerated_by(Fast(scores=1)), torch.no_grad():
        found = model(query, key, key)

    assert torch.equal(found, all_at_once(model, query, key, key))
    assert torch.allclose(found, F.scaled_dot_product_attention(query, key, key), atol=0.1)


@pytest.mark.parametrize("key_heads", [4, 2], ids=["each", "grouped"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "padding"])
@pytest.mark.parametrize("scores", [300, 2100], ids=["a head", "two samples"])
def test_heads_apart_give_the_numbers_of_all_at_once(scores: int, masked: bool, key_heads: int) -> None:
    model, x = Block(key_heads), torch.randn(3, 16, 32)
    mask = torch.ones(3, 1, 16, 16, dtype=torch.bool).tril()
    mask[1, :, :, :5] = False
    mask[1, :, :5, 0] = True
    given = (x, mask) if masked else (x,)
    parts: dict[str, Any] = {"weights": "mxfp4", "activations": "token(int8)", "outputs": None}
    simulation = qsim.simulate(model, **parts, example=given)

    with accelerated_by(Fast(scores=scores)), torch.no_grad():
        found = model(*given)

    assert torch.allclose(found, all_at_once(model, *given), atol=1e-5, rtol=1e-5)
    assert {site.calls for site in simulation.sites.table.values()} == {2}


CUT = {
    "a row's scale": {"activations": "token(int8)"},
    "blocks": {"activations": "abfp(int4, n=4)"},
    "bfloat16": {"activations": "mx(e4m3, n=4)", "outputs": "bf16", "arithmetic": "bf16"},
    "v along the head": {"activations": "mx(e4m3, n=4)", "outputs": "bf16", "arithmetic": "bf16", "value_axis": "head"},
    "a format as it is": {"activations": "e4m3", "outputs": "fp16"},
    "static": {"activations": "tensor(int8, static=true)"},
    "results only": {"outputs": "fp16"},
    "the tensor's scale": {"activations": "tensor(int8)"},
    "the tensor's rounded scale": {"activations": "tensor(int8, scale=bf16)"},
    "scales with a scale": {"activations": "scaled(e2m1, block=4, scale=scaled(e4m3))"},
}
NOT_CUT = {
    "a zero point": {"activations": "token(int8, symmetric=false)"},
    "a quantile": {"activations": "token(int8, range=percentile)"},
    "blocks across the cut": {"activations": "abfp(int4, n=3)"},
    "blocks' scales with one, across": {"activations": "scaled(e2m1, block=3, scale=scaled(e4m3))"},
    "the tensor's zero point": {"activations": "tensor(int8, symmetric=false)"},
    "results of a tensor": {"activations": "abfp(int4, n=4)", "outputs": "tensor(int8)"},
    "a codebook without zero": {"activations": "token(codebook([-1, -0.3, 0.3, 1]))"},
    "scales with a quantile": {"activations": "block(int4, 4, scale=channel(int8, range=percentile(90)))"},
    "scores that share a scale": {"activations": "abfp(int4, n=4)", "outputs": "token(int8)"},
}


WAYS = [
    pytest.param(kernels, kernels == bool(number % 2), parts, id=f"{name}-{'kernels' if kernels else 'reference'}")
    for number, (name, parts) in enumerate({**CUT, **NOT_CUT}.items())
    for kernels in (False, True)
]
"""Each recipe from the reference and from the kernels: one with grouped keys, the other without, in turns."""


@pytest.mark.parametrize(("kernels", "grouped", "parts"), WAYS)
def test_products_that_a_causal_mask_covers_are_left_out(kernels: bool, grouped: bool, parts: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    given = tuple(
        torch.randn(2, 22, heads, width, generator=generator).transpose(1, 2)
        for heads, width in ((4, 8), (2 if grouped else 4, 8), (2 if grouped else 4, 6))
    )
    model, recipe = Heads(causal=True, grouped=grouped), {"arithmetic": "float32", **parts}
    found: list[Tensor] = []
    with native.only(kernels), accelerated_by(Fast(queries=4, scores=3 * 4 * 22)), torch.no_grad():
        simulation = qsim.simulate(model, qsim.Recipe.of(recipe), example=given, calibration=[given])
        computed = multiplications(lambda: found.append(model(*given)))
        whole = all_at_once(model, *given)

    assert torch.allclose(found[0], whole, atol=1e-6, rtol=2**-8 if parts.get("outputs") == "bf16" else 1e-6)
    assert (computed < 2 * 4 * 22 * 22 * (8 + 6)) == (parts in CUT.values())
    assert {(site.calls, site.arithmetic) for site in simulation.sites.table.values()} == {(2, recipe["arithmetic"])}


def test_a_scale_for_the_whole_tensor_keeps_the_heads_together() -> None:
    model, x = Block(), torch.randn(2, 16, 32)
    x[1] *= 10
    qsim.simulate(model, activations="tensor(int8)", example=x)

    with torch.no_grad():
        two, one = model(x)[:1], model(x[:1])

    assert not torch.equal(one, two)


@pytest.fixture
def heads() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of ten tokens; attention is computed for four queries at a time."""
    query, key, value = torch.randn(3, 1, 2, 10, 8, generator=torch.Generator().manual_seed(0))
    with accelerated_by(Fast(queries=4)):
        yield query, key, value


@pytest.mark.parametrize("activations", ["token(int8)", "tensor(int8)"])
@pytest.mark.parametrize(("operand", "value"), [(1, torch.nan), (2, torch.inf)], ids=["a key", "a value"])
def test_nan_and_infinity_reach_as_much_as_without_cutting(
    operand: int, value: float, activations: str, heads: tuple[Tensor, ...]
) -> None:
    model = Heads(causal=True)
    qsim.simulate(model, activations=activations, example=heads)
    heads[operand][0, 0, 7, 0] = value

    with torch.no_grad():
        found = model(*heads)

    assert torch.equal(found.isnan(), all_at_once(model, *heads).isnan())
    assert found.isnan().any()


def test_products_that_were_first_met_as_something_else_are_no_attention(heads: tuple[Tensor, ...]) -> None:
    model = Heads(causal=True)
    qsim.simulate(model, activations="tensor(int8)", example=(*heads, torch.ones(1, 2, 3, 3)))

    with torch.no_grad():
        found = model(*heads)

    assert torch.allclose(found, all_at_once(model, *heads), atol=1e-6)


def test_autocast_chooses_its_own_dtypes(heads: tuple[Tensor, ...]) -> None:
    model = Heads(causal=True)
    qsim.simulate(model, activations="token(int8)", example=heads)
    mixed = heads[0], heads[1], heads[2].bfloat16()

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(*mixed), all_at_once(model, *mixed))


def test_float64_has_scales_of_its_own(heads: tuple[Tensor, ...]) -> None:
    wide = tuple(operand.double() for operand in heads)
    model = Heads(causal=True)
    qsim.simulate(model, activations="scaled(e2m1, block=4, scale=scaled(e4m3))", example=wide)

    with torch.no_grad():
        found = model(*wide)

    assert torch.allclose(found, all_at_once(model, *wide), rtol=1e-12, atol=1e-14)
