"""Products on other paths than float32: int8 is exact, bf16 rounds what float32 would have rounded."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qsim_fast import bf16, causal_attention, int8
from qsim_fast.kernels import native
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qsim_core as qsim
from qsim_core.formats.quantizer import Quantizer

INT8 = [
    ("channel(int8)", "token(int8)"),
    ("channel(int4)", "token(int8, symmetric=false)"),
    ("channel(uint8, symmetric=false)", "token(int8)"),
    ("channel(int4, symmetric=false)", "token(uint8, symmetric=false)"),
    ("tensor(int8)", "tensor(uint4, symmetric=false)"),
    ("channel(int8, range=mse)", "token(int6, range=absmax, symmetric=false)"),
    ("channel(int8, scale=bf16)", "token(int8, rule=floor)"),
    ("channel(int8)", "token(uint8)"),
]


class Layer(nn.Module):
    """A linear, or transformers' Conv1D."""

    def __init__(self, columns: int = 96, rows: int = 40, bias: bool = True, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.transposed = transposed
        weight = torch.randn(rows, columns, generator=generator)
        self.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
        self.bias = nn.Parameter(torch.randn(rows, generator=generator)) if bias else None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.transposed:
            flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)  # type: ignore[arg-type]
            return flat.view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)


def example() -> Tensor:
    """[3, 17, 96], one column an outlier."""
    x = torch.randn(3, 17, 96, generator=torch.Generator().manual_seed(2))
    x[..., 5] *= 30
    return x


def simulated(model: nn.Module, x: Tensor, path: str = "auto", keep: bool = True, **parts: Any) -> tuple[Tensor, str]:
    """What the model makes of `x`, and the path its first site took."""
    recipe = qsim.Recipe(arithmetic=path, **parts)  # type: ignore[arg-type]
    simulation = qsim.simulate(copy.deepcopy(model), recipe, example=x, keep=keep)
    with torch.no_grad():
        return simulation.model(x), simulation.audit().sites[0].arithmetic


def values(text: str, x: Tensor) -> Tensor:
    quantizer = qsim.parse(text)
    assert isinstance(quantizer, Quantizer)
    return quantizer.quantize(x)


def ulps(x: Tensor, exact: Tensor) -> float:
    """The largest difference to a float64 result, in units of the last place of float32."""
    nearest = exact.float().abs()
    step = torch.nextafter(nearest, torch.tensor(torch.inf)).double() - nearest.double()
    return float(((x.double() - exact).abs() / step).max())


def in_float64(text: str, rows: Tensor) -> Tensor:
    """What the codes of rows stand for, [M, K]."""
    made = int8.code(qsim.parse(text), rows)
    assert made is not None
    units = made.codes.double() - (0.0 if made.zero is None else made.zero.unsqueeze(-1))
    assert torch.allclose(made.values(), values(text, rows).reshape(units.shape), rtol=1e-6, atol=0)
    return units * made.scale.double().unsqueeze(-1)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "python"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "addmm"])
@pytest.mark.parametrize(("weights", "activations"), INT8)
def test_int8_is_within_two_ulps_of_float64(weights: str, activations: str, transposed: bool, kernels: bool) -> None:
    layer, x = Layer(transposed=transposed), example()
    rows = layer.weight.T if transposed else layer.weight
    with native.only(kernels):
        y, path = simulated(layer, x, "int8", weights=weights, activations=activations)
        exact = in_float64(activations, x) @ in_float64(weights, rows.detach()).T

    assert path == "int8"
    assert ulps(y, (exact + layer.bias.detach().double()).view(y.shape)) <= 2  # type: ignore[union-attr]


@pytest.mark.parametrize(("weights", "activations"), INT8)
def test_int8_is_the_float32_path_but_for_its_roundings(weights: str, activations: str) -> None:
    y, plain = (
        simulated(Layer(), example(), path, weights=weights, activations=activations)[0] for path in ("int8", "float32")
    )

    assert torch.allclose(y, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize(("weights", "activations"), INT8)
def test_kernels_and_python_give_the_same_bits(weights: str, activations: str) -> None:
    results = []
    for kernels in (True, False):
        with native.only(kernels):
            results.append(simulated(Layer(), example(), "int8", weights=weights, activations=activations)[0])

    assert torch.equal(*results)


def test_the_sum_is_exact_where_float32s_is_not() -> None:
    x, w = torch.full((1, 4096), 127.0), torch.full((1, 4096), 127.0)
    x[0, 0], w[0, 1] = 1.0, -126.0
    a, b = (int8.code(qsim.parse("token(int8)"), operand) for operand in (x, w))
    assert a is not None and b is not None
    exact = int((x.double() * w.double()).sum())

    assert torch._int_mm(a.codes, b.codes.T).item() == exact
    assert int8.product(a, b, None).item() == torch.tensor(exact, dtype=torch.float64).float().item()


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "overwritten"])
def test_codes_of_kept_and_of_overwritten_weights_are_the_same(keep: bool) -> None:
    layer, x = Layer(), example()
    simulation = qsim.simulate(
        copy.deepcopy(layer),
        qsim.Recipe(arithmetic="int8", weights="int4", activations="int8"),
        keep=keep,  # type: ignore[arg-type]
    )
    with torch.no_grad():
        first, again = simulation.model(x), simulation.model(x)
        copied = pickle.loads(pickle.dumps(simulation.model))(x)

    expected = simulated(layer, x, "int8", weights="int4", activations="int8")[0]
    assert torch.equal(first, expected) and torch.equal(again, expected) and torch.equal(copied, expected)


def test_an_overwritten_weight_holds_its_quantized_values() -> None:
    model = copy.deepcopy(Layer())
    simulation = qsim.simulate(
        model,
        qsim.Recipe(arithmetic="int8", weights="int4", activations="int8"),
        keep=False,  # type: ignore[arg-type]
    )
    with torch.no_grad():
        simulation.model(example())

    assert torch.equal(model.weight, values("channel(int4)", Layer().weight.detach()))


def test_an_optimizers_step_is_seen() -> None:
    layer, x = Layer(), example()
    simulation = qsim.simulate(layer, qsim.Recipe(arithmetic="int8", weights="int8", activations="int8"))  # type: ignore[arg-type]
    with torch.no_grad():
        simulation.model(x)
        layer.weight.mul_(2)
        doubled = simulation.model(x)

    fresh = copy.deepcopy(Layer())
    with torch.no_grad():
        fresh.weight.mul_(2)
    assert torch.equal(doubled, simulated(fresh, x, "int8", weights="int8", activations="int8")[0])


@pytest.mark.parametrize("where", ["row", "channel"])
def test_nan_spreads_as_on_the_float32_path(where: str) -> None:
    layer, x = Layer(), example()
    with torch.no_grad():
        (x[0, 0] if where == "row" else layer.weight[3])[7] = torch.nan

    y, plain = (simulated(layer, x, path, weights="int8", activations="int8")[0] for path in ("int8", "float32"))
    assert torch.equal(y.isnan(), plain.isnan()) and bool(y.isnan().any())


def test_a_static_scale_hides_no_nan() -> None:
    layer, x = Layer(), example()
    recipe = qsim.Recipe(arithmetic="int8", weights="int8", activations="tensor(int8, static=true)")  # type: ignore[arg-type]
    simulation = qsim.simulate(layer, recipe, calibration=[x])
    with torch.no_grad():
        assert simulation.audit(x).sites[0].arithmetic == "int8"
        x[0, 0, 0] = torch.nan
        y = simulation.model(x)

    assert y.isnan().sum() == 40 and y[0, 0].isnan().all()


BF16 = [
    ("mxfp4", "mxfp8_e4m3"),
    ("mxfp8_e5m2", "mxfp6_e2m3"),
    ("mxint8", "mxint8"),
    ("msfp12", "msfp16"),
    ("cast(e4m3)", "cast(e5m2)"),
    ("channel(int4, rule=ceil)", "token(int8, rule=floor)"),
    ("cast(bf16)", "cast(bf16)"),
]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "python"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("weights", "activations"), BF16)
def test_bf16_is_the_float32_path_but_for_the_order_of_summation(
    weights: str, activations: str, bias: bool, kernels: bool
) -> None:
    layer, x, parts = Layer(bias=bias), example(), {"weights": weights, "activations": activations, "outputs": "bf16"}
    with native.only(kernels):
        y, path = simulated(layer, x, "bf16", **parts)
        plain, _ = simulated(layer, x, "float32", **parts)

    different = y != plain
    step = torch.ldexp(torch.ones_like(plain), torch.frexp(plain).exponent - 8)
    assert path == "bf16"
    assert different.float().mean() < 0.01
    assert bool(((y - plain).abs()[different] <= step[different]).all())


def test_a_bias_is_added_before_the_rounding() -> None:
    layer, x = Layer(rows=1), torch.zeros(1, 1, 96)
    with torch.no_grad():
        layer.bias.fill_(1.00390625 + 2.0**-20)  # type: ignore[union-attr]  # past half a bfloat16 step above 1

    y, path = simulated(layer, x, "bf16", weights="mxfp4", activations="mxfp4", outputs="bf16")
    assert (y.item(), path) == (1.0078125, "bf16")


class Convolution(nn.Module):
    """A convolution of any number of dimensions, by torch's function."""

    def __init__(self, space: int, groups: int = 1, bias: bool = True, taps: int = 3, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = (F.conv1d, F.conv2d, F.conv3d)[space - 1]
        self.options = {**options, "groups": groups}
        self.weight = nn.Parameter(torch.randn(12, 8 // groups, *[taps] * space, generator=generator))
        self.bias = nn.Parameter(torch.randn(12, generator=generator)) if bias else None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias, **self.options)


CONVOLUTIONS = [
    Convolution(2, padding=1),
    Convolution(2, bias=False, padding="same"),
    Convolution(2, stride=2, padding=1, groups=2),
    Convolution(2, padding="valid", dilation=2),
    Convolution(2, taps=4, stride=4),
    Convolution(1, padding=2, dilation=2),
    Convolution(3, padding=1),
]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("model", CONVOLUTIONS, ids=lambda model: f"{model.weight.dim() - 2}d {model.options}")
def test_a_convolution_in_bf16_is_the_float32_one_but_for_the_order_of_summation(model: Any, keep: bool) -> None:
    x = torch.randn(2, 8, *[8] * (model.weight.dim() - 2), generator=torch.Generator().manual_seed(1))
    parts = {"weights": "mx(e4m3, n=8)", "activations": "mx(e4m3, n=8)", "outputs": "bf16"}

    y, path = simulated(model, x, "bf16", keep=keep, **parts)
    slow, _ = simulated(model, x, "float32", keep=keep, **parts)

    assert path == "bf16" and y.is_contiguous()
    assert float((y != slow).double().mean()) < 0.01
    assert torch.allclose(y, slow, rtol=2**-7, atol=1e-3)


def test_a_bias_that_every_tap_would_lose_at_an_edge_takes_float32() -> None:
    x = torch.randn(2, 8, 8, 8)
    parts = {"weights": "mx(e4m3, n=8)", "activations": "mx(e4m3, n=8)", "outputs": "bf16"}

    paths = [simulated(Convolution(2, taps=1, padding=1, bias=bias), x, "bf16", **parts)[1] for bias in (True, False)]

    assert paths == ["float32", "bf16"]


def test_in_parts_is_the_bias() -> None:
    bias = torch.randn(100) * torch.randn(100).exp2()

    parts = bf16.in_parts(bias)
    assert parts is not None and torch.equal(parts.double().sum(-1).float(), bias)


def test_values_that_bfloat16_matmuls_would_flush_stay_on_the_float32_path() -> None:
    layer, x = Layer(bias=False), example() * 2.0**-80

    _, path = simulated(layer, x, "bf16", weights="mxfp4", activations="mxfp4", outputs="bf16")
    assert path == "float32"


@pytest.mark.parametrize(
    "parts",
    [
        {"weights": "abfp(int4)", "activations": "abfp(int8)", "outputs": "bf16"},
        {"weights": "int8", "activations": None},
        {"weights": "int16", "activations": "int8"},
        {"weights": "channel(int8(rounding=stochastic))", "activations": "int8"},
        {"weights": "mxfp4", "activations": "mxfp4"},
        {"weights": "mxfp4", "activations": "mxfp4", "outputs": "fp16"},
        {"weights": "cast(fp16)", "activations": "mxfp4", "outputs": "bf16"},
        {"weights": "nvfp4", "activations": "nvfp4", "outputs": "bf16"},
    ],
    ids=str,
)
def test_what_is_exact_on_no_other_path_stays_on_float32(parts: dict[str, Any]) -> None:
    assert simulated(Layer(), example(), **parts)[1] == "float32"


def test_a_path_that_is_named_is_the_only_other_one() -> None:
    parts = {"weights": "channel(int4, rule=ceil)", "activations": "token(int8, rule=floor)", "outputs": "bf16"}

    assert [simulated(Layer(), example(), path, **parts)[1] for path in ("int8", "bf16", "float32")] == [
        "int8",
        "bf16",
        "float32",
    ]


def test_a_training_model_stays_on_float32() -> None:
    layer = Layer().train()

    assert simulated(layer, example(), "int8", weights="int8", activations="int8")[1] == "int8"  # the audit evaluates
    simulation = qsim.simulate(layer, qsim.Recipe(arithmetic="int8", weights="int8", activations="int8"))  # type: ignore[arg-type]
    with torch.no_grad():
        simulation.model(example())
    assert simulation.audit().sites[0].arithmetic == "float32"


def test_one_column_stays_on_float32() -> None:
    assert simulated(Layer(columns=1), torch.randn(4, 1), "int8", weights="int8", activations="int8")[1] == "float32"


@pytest.mark.parametrize("shape", [(1,), (), (51, 1), (51, 40)], ids=str)
def test_what_is_added_to_addmm_is_a_row_or_takes_float32(shape: tuple[int, ...]) -> None:
    class Added(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, 96), self.weight.T)  # type: ignore[arg-type]

    layer = Added()
    layer.bias = nn.Parameter(torch.ones(shape))
    y, path = simulated(layer, example(), "int8", weights="int8", activations="int8")

    assert path == "float32" and torch.allclose(
        y, simulated(layer, example(), "float32", weights="int8", activations="int8")[0]
    )


def test_a_bias_that_trains_alone_has_a_gradient() -> None:
    layer = Layer()
    layer.weight.requires_grad_(False)
    qsim.simulate(layer, qsim.Recipe(arithmetic="int8", weights="int8", activations="int8"))  # type: ignore[arg-type]
    layer(example()).sum().backward()

    assert layer.bias is not None and layer.bias.grad is not None


@pytest.mark.parametrize("keep", [True, False])
def test_one_weight_with_a_bias_and_without(keep: bool) -> None:
    class Both(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias) + F.linear(x, self.weight)

    parts = {"weights": "mxfp4", "activations": "mxfp4", "outputs": "bf16"}
    y, plain = (simulated(Both(), example(), path, keep, **parts)[0] for path in ("bf16", "float32"))

    assert torch.allclose(y, plain, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("path", ["int8", "bf16"])
def test_what_was_made_in_inference_mode_serves_without_it(path: str) -> None:
    parts = {"weights": "channel(int4, rule=ceil)", "activations": "token(int8, rule=floor)", "outputs": "bf16"}
    simulation = qsim.simulate(Layer(), qsim.Recipe(arithmetic=path, **parts))  # type: ignore[arg-type]
    with torch.inference_mode():
        first = simulation.model(example())
    with torch.no_grad():
        assert torch.equal(simulation.model(example()), first)


def test_vmap_over_a_model_takes_float32() -> None:
    layer, x = Layer(), example()
    qsim.simulate(layer, qsim.Recipe(arithmetic="int8", weights="int8", activations="int8"), example=x)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.warns(UserWarning, match="performance drop"):
        assert torch.allclose(torch.vmap(layer)(x), layer(x), atol=1e-4)


@pytest.mark.parametrize("rounding", ["zero", "away"])
def test_overwritten_weights_give_the_codes_that_they_had(rounding: str) -> None:
    parts = {"weights": f"channel(int(6, rounding={rounding}))", "activations": "int8"}
    kept, overwritten = (simulated(Layer(), example(), "int8", keep, **parts)[0] for keep in (True, False))

    assert torch.equal(kept, overwritten)


@pytest.mark.parametrize("path", ["int8", "float32"])
def test_a_parameter_that_got_anothers_address_is_not_taken_for_it(path: str) -> None:
    layer, x = Layer(), example()
    simulation = qsim.simulate(layer, qsim.Recipe(arithmetic=path, weights="int8", activations="int8"))  # type: ignore[arg-type]
    for seed in range(20):
        weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            y = torch.func.functional_call(simulation.model, {"weight": weight}, x)
        exact = F.linear(x, weight, layer.bias)
        assert (y - exact).norm() < 0.1 * exact.norm()
        del weight


def test_what_bfloat16_cannot_hold_takes_float32() -> None:
    layer = Layer(bias=False)
    with torch.no_grad():
        layer.weight.fill_(2.0**100)
    parts = {"weights": "mxfp4", "activations": "mx(int4, scale=none)", "outputs": "bf16"}

    assert simulated(layer, torch.full((2, 96), 2.0**-140), "bf16", **parts)[1] == "float32"


@pytest.mark.parametrize("name", ["multi_query", "kv once", "3-D"])
def test_heads_of_other_shapes_stay_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"multi_query": [(2, 4, 8, 16), (2, 1, 8, 16)], "kv once": [(2, 4, 8, 16), (1, 4, 8, 16)]}
    query, key = (torch.randn(shape) for shape in shapes.get(name, [(2, 4, 8, 16), (4, 8, 16)]))

    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, key)

    model = Attention().eval()
    qsim.simulate(model, activations="token(int8)", example=(query, key))
    monkeypatch.setattr("qsim_fast.tiled_attention.TOGETHER", 1)
    with torch.no_grad():
        assert torch.allclose(model(query, key), F.scaled_dot_product_attention(query, key, key), atol=0.1)


def test_a_gradient_takes_the_float32_path() -> None:
    layer, x = Layer(), example()
    simulation = qsim.simulate(layer, qsim.Recipe(arithmetic="int8", weights="int8", activations="int8"))  # type: ignore[arg-type]
    simulation.model(x).sum().backward()

    assert layer.weight.grad is not None and simulation.audit().sites[0].arithmetic == "float32"


def test_a_residual_that_is_added_is_no_bias() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(x, x, self.weight)

    assert simulated(Residual(), torch.randn(4, 8), "int8", weights="int8", activations="int8")[1] == "float32"


def test_q_k_and_v_share_their_codes(make: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = int8.code
    monkeypatch.setattr(int8, "code", lambda *given: seen.append(given[1].shape) or original(*given))
    model = make("llama", "sdpa")
    layers = model.config.num_hidden_layers
    recipe = qsim.Recipe(arithmetic="int8", weights="int8", activations="int8", skip=("*:qk", "*:pv", "lm_head"))  # type: ignore[arg-type]
    qsim.simulate(model, recipe, example=ids)
    with torch.no_grad():
        model(ids)
        seen.clear()
        model(ids)

    assert len(seen) == 4 * layers  # q, k, v; o; gate, up; down


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "padding"])
@pytest.mark.parametrize("together", [300, 2100], ids=["a head", "two samples"])
def test_heads_apart_give_what_all_at_once_give(
    together: int, family: str, masked: bool, make: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family, "sdpa")
    ids = torch.cat([ids, ids + 1])[:3]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}
    parts: dict[str, Any] = {"weights": "mxfp4", "activations": "token(int8)", "outputs": None}
    simulation = qsim.simulate(model, **parts, example=batch)
    results = []
    for alone in (True, False):
        monkeypatch.setattr(
            "qsim_fast.tiled_attention._alone", lambda query, alone=alone: alone and not torch.is_grad_enabled()
        )
        monkeypatch.setattr("qsim_fast.tiled_attention.TOGETHER", together)
        with torch.no_grad():
            results.append(model(**batch).logits)
    counts = {site.calls for site in simulation.sites.table.values() if site.weight is None}

    assert torch.allclose(*results, atol=1e-5, rtol=1e-5)
    assert counts == {2}


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


@pytest.mark.parametrize("parts", [*CUT.values(), *NOT_CUT.values()], ids=[*CUT, *NOT_CUT])
@pytest.mark.parametrize("grouped", [False, True], ids=["each", "grouped"])
@pytest.mark.parametrize("fast", ["0", "1"], ids=["reference", "kernels"])
def test_what_a_causal_mask_covers_is_left_out(
    fast: str, grouped: bool, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 22, heads, width, generator=generator).transpose(1, 2)
        for heads, width in ((4, 8), (2 if grouped else 4, 8), (2 if grouped else 4, 6))
    )
    model, cut, computed = Attention().eval(), causal_attention.causal_attention, []
    monkeypatch.setattr(native._waiting, "wanted", fast == "1")
    monkeypatch.setattr(
        "qsim_fast.tiled_attention.causal_attention", lambda *given: computed.append(given) or cut(*given)
    )
    monkeypatch.setattr("qsim_fast.causal_attention.ROWS", 4)
    monkeypatch.setattr("qsim_fast.causal_attention.TOGETHER", 3 * 4 * 22)
    simulation = qsim.simulate(
        model, qsim.Recipe.of(parts), example=(query, key, value), calibration=[(query, key, value)]
    )
    results = []
    for rows in (4, 1000):
        monkeypatch.setattr("qsim_fast.tiled_attention.ROWS", rows)
        with torch.no_grad():
            results.append(model(query, key, value))

    found = simulation.sites.table.values()
    assert torch.allclose(*results, atol=1e-6, rtol=2**-8 if parts.get("outputs") == "bf16" else 1e-6)
    assert bool(computed) == (parts in CUT.values())
    assert {site.calls for site in found} == {2}
    assert {site.arithmetic for site in found} == {parts.get("arithmetic", "float32")}


def test_a_scale_for_the_whole_tensor_keeps_the_heads_together(make: Any, ids: Tensor) -> None:
    model = make("opt", "sdpa")
    qsim.simulate(model, activations="tensor(int8)", example=ids)
    with torch.no_grad():
        two = model(ids).logits[:1]
        one = model(ids[:1]).logits

    assert not torch.equal(one, two)


class Causal(nn.Module):
    """Attention of queries, keys and values, with two other products before it if there is a fourth argument."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, other: Tensor | None = None) -> Tensor:
        if other is not None:
            return (other @ other) @ other
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ten tokens, in blocks of four."""
    for module in ("apart", "causal"):
        monkeypatch.setattr(f"qsim_core.{module}.ROWS", 4)
    query, key, value = torch.randn(3, 1, 2, 10, 8, generator=torch.Generator().manual_seed(0))
    return query, key, value


def by_explicit_attention(model: nn.Module, *given: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("qsim_fast.tiled_attention.ROWS", 1000)
        return model(*given)  # type: ignore[no-any-return]


@pytest.mark.parametrize("activations", ["token(int8)", "tensor(int8)"])
@pytest.mark.parametrize(("operand", "value"), [(1, torch.nan), (2, torch.inf)], ids=["a key", "a value"])
def test_what_is_no_number_reaches_as_much_as_it_does_without_cutting(
    operand: int, value: float, activations: str, heads: tuple[Tensor, ...]
) -> None:
    model = Causal().eval()
    qsim.simulate(model, activations=activations, example=heads)
    heads[operand][0, 0, 7, 0] = value

    with torch.no_grad():
        found = model(*heads)

    assert torch.equal(found.isnan(), by_explicit_attention(model, *heads).isnan())
    assert found.isnan().any()


def test_products_that_were_first_met_as_something_else_are_no_attention(heads: tuple[Tensor, ...]) -> None:
    model = Causal().eval()
    qsim.simulate(model, activations="tensor(int8)", example=(*heads, torch.ones(1, 2, 3, 3)))

    with torch.no_grad():
        found = model(*heads)

    assert torch.allclose(found, by_explicit_attention(model, *heads), atol=1e-6)


def test_autocast_chooses_its_own_dtypes(heads: tuple[Tensor, ...]) -> None:
    model = Causal().eval()
    qsim.simulate(model, activations="token(int8)", example=heads)
    mixed = heads[0], heads[1], heads[2].bfloat16()

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model(*mixed)
        assert torch.equal(found, by_explicit_attention(model, *mixed))


def test_float64_has_scales_of_its_own(heads: tuple[Tensor, ...]) -> None:
    wide = tuple(operand.double() for operand in heads)
    model = Causal().eval()
    qsim.simulate(model, activations="scaled(e2m1, block=4, scale=scaled(e4m3))", example=wide)

    with torch.no_grad():
        found = model(*wide)

    assert torch.allclose(found, by_explicit_attention(model, *wide), rtol=1e-12, atol=1e-14)


def test_a_gradient_is_that_of_what_was_computed() -> None:
    """What was quantized where no gradient is recorded is not used again where one is."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor, alone: bool = False) -> Tensor:
            if alone:
                return self.b(x)  # type: ignore[no-any-return]
            with torch.no_grad():
                self.a(x)
            out: Tensor = self.b(x)
            with torch.no_grad():
                self.c(y)
            return out

    model, found = Half().eval(), []
    qsim.simulate(model, qsim.Recipe.of({"weights": "int8", "activations": "token(int8)", "arithmetic": "float32"}))
    for alone in (False, True):
        x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)).unbind()
        x.requires_grad_()
        model.zero_grad()
        model(x, y, alone).sum().backward()
        found.append((model.b.weight.grad.clone(), x.grad.clone()))  # type: ignore[union-attr]

    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Twice(nn.Module):
    """Three operands, of which one is a weight, between two products whose input is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        self.eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = F.linear(y, self.weight)
        both = torch.einsum("bi,bi,oi->bo", y, x, self.weight)
        return first + both + F.linear(y, self.weight)


def test_inputs_that_are_needed_together_do_not_share_their_memory() -> None:
    x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    model = Twice()
    qsim.simulate(model, weights="int8", activations="token(int8)")

    with torch.no_grad():
        found = model(x, y)

    own = model(x, y).detach()  # where gradients are recorded, all is in memory of its own
    assert torch.allclose(found, own, atol=1e-5)


def test_what_is_quantized_for_one_model_is_not_touched_by_another() -> None:
    class Meanwhile(Twice):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            first = F.linear(y, self.weight)
            other(x)
            return first + F.linear(y, self.weight)

    other, model = nn.Linear(8, 8).eval(), Meanwhile()
    x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    for each in (other, model):
        qsim.simulate(each, qsim.Recipe.of({"weights": "int8", "activations": "token(int8)", "arithmetic": "float32"}))

    with torch.no_grad():
        found = model(x, y)

    assert torch.equal(found, model(x, y).detach())


def test_whoever_looks_on_below_keeps_what_was_quantized() -> None:
    class Keeping(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten.addmm:
                seen.append((args[1], args[1].clone()))
            return func(*args, **(kwargs or {}))

    seen: list[tuple[Tensor, Tensor]] = []
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).eval()
    qsim.simulate(model, qsim.Recipe.of({"weights": "int8", "activations": "token(int8)", "arithmetic": "float32"}))

    with torch.no_grad(), Keeping():
        model(torch.randn(8, 64))

    assert len(seen) == 3 and all(torch.equal(x, then) for x, then in seen)
