"""What a matmul is and what its weight is: computed weights, tables that are looked up, outer products."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import qsim_core as qsim


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Computes(nn.Module):
    """A module that multiplies by a weight, which `weight` computes from its parameter."""

    def __init__(self, weight: Callable[[Computes], Tensor], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.parameter, self.other = nn.Parameter(drawn(8, 12)), nn.Parameter(drawn(8, 12) + 1)
        self.down, self.up = nn.Parameter(drawn(2, 12)), nn.Parameter(drawn(8, 2))
        self.stack = nn.Parameter(drawn(3, 8, 12))
        self.register_buffer("mask", (drawn(8, 12) > 0).float())
        self.plain, self.kept = drawn(8, 12) > 0, {"masks": [drawn(8, 12) > 0]}
        self.weight, self.product = weight, product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight(self))


WEIGHTS: dict[str, Callable[[Computes], Tensor]] = {
    "pruned": lambda m: m.mask * m.parameter,
    "pruned by a mask made on the spot": lambda m: m.parameter * torch.ones(8, 12).tril(),
    "pruned by a plain tensor": lambda m: m.plain * m.parameter,
    "pruned by one in a list": lambda m: m.parameter * m.kept["masks"][0][:1],
    "scaled by a tensor of numbers": lambda m: m.parameter * torch.tensor(0.5),
    "triangular": lambda m: m.parameter.tril(),
    "normed": lambda m: F.normalize(m.parameter, dim=1),
    "normed by gains": lambda m: torch._weight_norm(m.parameter, m.other[:, :1], 0),
    "standardised": lambda m: (m.parameter - m.parameter.mean(1, True)) / m.parameter.std(1, keepdim=True),
    "softmaxed": lambda m: m.parameter.softmax(-1),
    "scaled in place": lambda m: m.parameter.clone().mul_(m.other),
    "scaled": lambda m: 0.5 * m.parameter,
    "cast": lambda m: m.parameter.bfloat16().float(),
    "a copy of a slice": lambda m: torch.cat([m.parameter[:4], m.other[4:]]),
    "chosen rows": lambda m: m.parameter[[0, 3, 5, 1, 2, 7, 6, 4]],
    "written into zeros": lambda m: _block(torch.zeros(8, 12), m.parameter),
    "a part of a chunked one": lambda m: (m.parameter * 1).chunk(2)[0],
    "without its gradient": lambda m: m.parameter.detach(),
    "its data": lambda m: m.parameter.data,
    "with a low-rank update": lambda m: m.parameter + 0.1 * (m.up @ m.down),
    "with an update of rank one": lambda m: m.parameter + m.up[:, :1] @ m.down[:1],
    "transposed twice": lambda m: (m.parameter * 2).t().contiguous().t(),
    "of chosen experts": lambda m: m.stack[torch.tensor([1])][0],
}


def _block(zeros: Tensor, parameter: Tensor) -> Tensor:
    zeros[:4] = parameter[:4]
    return zeros


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_computed_weight_takes_the_quantizer_of_weights(name: str, grad: bool) -> None:
    model, x = Computes(WEIGHTS[name], F.linear), drawn(5, 12)
    expected = F.linear(x, qsim.parse("channel(int3)")(WEIGHTS[name](model)))

    simulation = qsim.simulate(model, weights="int3", example=x)
    with torch.set_grad_enabled(grad):
        y = model(x)

    assert torch.allclose(y, expected, atol=1e-6)
    assert [bool(site.weight) for site in simulation.audit().sites] == [True]


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w.t(),
        lambda x, w: torch.einsum("bi,oi->bo", x, w),
        lambda x, w: torch.addmm(torch.zeros(8), x, w.t()),
        lambda x, w: F.conv1d(x[..., None], w[..., None])[..., 0],
        lambda x, w: torch.conv_tbc(x[None], w.t()[None], torch.zeros(8))[0],
        lambda x, w: torch.linalg.multi_dot([x, w.t()]),
    ],
)
def test_whatever_function_multiplies_by_it(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = Computes(WEIGHTS["pruned"], product), drawn(5, 12)
    expected = product(x, qsim.parse("channel(int3)")(WEIGHTS["pruned"](model)))

    with torch.no_grad(), qsim.simulate(model, weights="int3", activations="none", example=x):
        assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    "weight",
    [
        lambda x, w: w.type_as(x),
        lambda x, w: w.to(x),
        lambda x, w: _block(x.new_zeros(8, 12), w),
        lambda x, w: w * torch.full_like(x[:1], 2.0),
    ],
)
def test_it_may_have_the_dtype_or_the_shape_of_an_activation(weight: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = Computes(lambda m: m.parameter, lambda x, w: F.linear(x, weight(x, w))), drawn(5, 12).double()
    expected = F.linear(x, qsim.parse("channel(int3)")(weight(x, model.parameter)))

    with torch.no_grad(), qsim.simulate(model, weights="int3", example=x):
        assert torch.allclose(model(x), expected)


@pytest.mark.parametrize("choose", [lambda w, x: w[x], lambda w, x: w.index_select(0, x)])
def test_rows_that_an_activation_chooses_are_a_layers_weight(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A sampled softmax scores the words that the forward has drawn."""
    model = Computes(lambda m: m.parameter, lambda x, w: F.linear(x, choose(w, x.sum(0).topk(4).indices % 8)))
    x, rounded = drawn(5, 12), qsim.parse("channel(int3)")(model.parameter)
    expected = F.linear(x, rounded[x.sum(0).topk(4).indices % 8])

    with torch.no_grad(), qsim.simulate(model, weights="int3", example=x):
        assert torch.allclose(model(x), expected, atol=1e-6)


def test_a_layer_may_be_pruned_after_it_is_simulated() -> None:
    model, x = nn.Sequential(nn.Linear(12, 8)), drawn(5, 12)
    simulation = qsim.simulate(model, weights="int3", example=x)

    prune.l1_unstructured(model[0], "weight", 0.5)

    assert torch.allclose(model(x), F.linear(x, qsim.parse("channel(int3)")(model[0].weight), model[0].bias), atol=1e-6)
    assert simulation.audit().sites[0].site == "0"


def test_what_a_forward_leaves_at_a_module_is_an_activation() -> None:
    class Recurrent(Computes):
        def forward(self, x: Tensor) -> Tensor:
            self.state: Tensor = torch.tanh(x @ self.parameter.T if "state" not in vars(self) else self.state @ self.up)
            return self.state

    model, x = Recurrent(lambda m: m.parameter, F.linear), drawn(5, 12)
    model.up = nn.Parameter(drawn(8, 8))
    qsim.simulate(model, weights="int3")
    with torch.no_grad():
        state = model(x).clone()
        y = model(x)

        assert torch.allclose(y, torch.tanh(state @ qsim.parse("channel(int3)")(model.up.T).T), atol=1e-6)


def old(name: str) -> Callable[[nn.Module], nn.Module]:
    def apply(layer: nn.Module) -> nn.Module:
        with pytest.warns(FutureWarning):
            return getattr(nn.utils, name)(layer)  # type: ignore[no-any-return]

    return apply


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "apply",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        parametrized,
        old("weight_norm"),
        nn.utils.spectral_norm,
    ],
)
def test_a_layer_that_torch_prunes_or_parametrizes_keeps_its_name(
    apply: Callable[[nn.Module], nn.Module], alone: bool
) -> None:
    layer = apply(nn.Linear(12, 8)).eval()
    model, x = layer if alone else nn.Sequential(nn.ReLU(), layer), drawn(5, 12).abs()
    with torch.no_grad():
        model(x)
        expected = F.linear(x, qsim.parse("channel(int3)")(layer.weight), layer.bias)

        simulation = qsim.simulate(model, weights="int3", example=x)
        y = model(x)

    (site,) = simulation.audit().sites
    assert (site.site, site.weight) == ("weight" if alone else "1", "channel(int3)")
    assert torch.allclose(y, expected, atol=1e-6)


def test_a_computed_weight_is_pointed_out_and_trains() -> None:
    model, x = Computes(WEIGHTS["scaled"], F.linear), drawn(5, 12)
    simulation = qsim.simulate(model, weights="int3", example=x)

    model.train()(x).sum().backward()

    assert simulation.audit().notes == [
        "parameter: its weight is computed from parameter, and is quantized in each forward"
    ]
    assert model.parameter.grad is not None
    assert torch.allclose(model.parameter.grad, 0.5 * x.sum(0).expand(8, 12))


def test_a_weight_that_depends_on_the_input_is_an_activation() -> None:
    model, x = Computes(lambda m: m.parameter.clone(), lambda x, w: F.linear(x, w.mul_(x.mean()))), drawn(5, 12)

    with pytest.raises(qsim.RecipeError, match=r"^weights: channel\(int3\) reached no site of this model$"):
        qsim.simulate(model, weights="int3", example=x)


@pytest.mark.parametrize("override", [True, False])
def test_a_recipe_whose_weights_reach_no_weight_is_an_error_without_an_example_too(override: bool) -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.transpose(-1, -2)

    model = Attention()
    recipe = {"overrides": {"*": {"weights": "int4"}}} if override else {"weights": "int4"}
    qsim.simulate(model, recipe)

    with pytest.raises(qsim.RecipeError, match="reached no site"):
        model(drawn(2, 3, 4))


def test_a_parameter_that_comes_in_as_input_is_an_activation() -> None:
    model, x = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 8)), nn.Parameter(drawn(5, 12))
    simulation = qsim.simulate(model, activations="int8", example=x)

    (site,) = simulation.audit().sites
    assert (site.site, site.input, site.calls) == ("1", "token(int8)", 1)


LOOK_UPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "embedding": lambda table, ids: F.embedding(ids, table),
    "embedding_bag": lambda table, ids: F.embedding_bag(ids, table),
    "index": lambda table, ids: table[ids],
    "index_select": lambda table, ids: table.index_select(0, ids.flatten()),
    "gather": lambda table, ids: table.gather(0, ids.flatten()[:, None].expand(-1, 5)),
    "take_along_dim": lambda table, ids: torch.take_along_dim(table, ids.flatten()[:, None], 0),
    "one-hot": lambda table, ids: F.one_hot(ids, 50).to(table.dtype) @ table,
    "a row of its transpose": lambda table, ids: table.t()[:, ids.flatten()].t(),
    "without its gradient": lambda table, ids: F.embedding(ids, table.detach()),
    "numpy": lambda table, ids: torch.from_numpy(table.detach().numpy()[ids.numpy()]),
    "a list": lambda table, ids: torch.tensor(table.tolist())[ids],
    "a number": lambda table, ids: torch.full((5, 5), table[7, 3].item()),
}


class Tied(nn.Module):
    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.look_up, self.layer = nn.Parameter(drawn(50, 5)), look_up, nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.layer(self.look_up(self.table, ids)), self.table)


@pytest.mark.parametrize("transforms", [(), ("gptq",)])
@pytest.mark.parametrize("way", LOOK_UPS)
def test_a_table_that_is_looked_up_is_never_overwritten(way: str, transforms: tuple[str, ...]) -> None:
    model, ids = Tied(LOOK_UPS[way]), torch.randint(0, 50, (5, 5), generator=torch.Generator().manual_seed(0))
    table = model.table.detach().clone()
    batches = [ids] if transforms else None
    qsim.simulate(model, weights="int3", transforms=transforms, calibration=batches, example=ids, keep=False)

    with torch.no_grad():
        first, second = model(ids), model(ids)

    assert torch.equal(first, second)
    assert torch.equal(model.table, table)


def test_a_table_that_was_overwritten_before_it_is_looked_up_is_an_error() -> None:
    class Late(Tied):
        def forward(self, x: Tensor) -> Tensor:
            return self.table[F.linear(x, self.table).argmax(-1)]

    model = Late(lambda table, ids: ids)
    qsim.simulate(model, weights="int3", keep=False)

    with torch.no_grad(), pytest.raises(qsim.QsimError, match="^table is also read by other code than a matmul"):
        model(drawn(5, 5))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "outer": torch.outer,
    "einsum": lambda a, b: torch.einsum("i,j->ij", a, b),
    "einsum of a batch": lambda a, b: torch.einsum("...n,d->...nd", a, b),
    "einsum without an output": lambda a, b: torch.einsum("i,j", a, b),
    "einsum that sums one alone": lambda a, b: torch.einsum("i,jk->ij", a, b[:, None]),
    "einsum of one element": lambda a, b: torch.einsum("ik,kj->ij", a[:, None], b[None]),
    "tensordot": lambda a, b: torch.tensordot(a, b, dims=0),
    "matmul": lambda a, b: a[:, None] @ b[None],
    "bmm": lambda a, b: torch.bmm(a[None, :, None], b[None, None])[0],
    "linear": lambda a, b: F.linear(a[:, None], b[:, None]),
}


@pytest.mark.parametrize("way", PRODUCTS)
def test_a_product_that_adds_nothing_up_is_no_matmul(way: str) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(12, 12)
            self.register_buffer("frequencies", 10000 ** -(torch.arange(12) / 12))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * PRODUCTS[way](torch.arange(50.0), self.frequencies).cos()  # type: ignore[no-any-return]

    model, x = Rotary(), drawn(2, 50, 12)
    plain = copy.deepcopy(model)
    audit = qsim.simulate(model, activations="tensor(int4)", example=x).audit()

    expected = F.linear(qsim.parse("tensor(int4)")(x), plain.q.weight, plain.q.bias)
    assert [site.site for site in audit.sites] == ["q"]
    assert audit.uncovered == []
    assert torch.allclose(model(x), expected * torch.outer(torch.arange(50.0), plain.frequencies).cos(), atol=1e-5)


def test_a_layer_scale_by_einsum_is_no_matmul() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(12, 12), nn.Parameter(drawn(12))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("blc,c->blc", self.layer(x), self.scale)

    simulation = qsim.simulate(Scaled(), weights="int4", example=drawn(2, 5, 12))

    assert [site.site for site in simulation.audit().sites] == ["layer"]


def test_one_token_of_attention_is_a_matmul() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    model, (q, k, v) = Attention(), drawn(3, 1, 2, 1, 8)
    qsim.simulate(model, {"values": "token(int3)", "value_axis": "head"}, example=(q, k, v))

    assert torch.equal(model(q, k, v), qsim.parse("token(int3)")(v))
