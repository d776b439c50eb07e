"""Exact arithmetics: int8 rounds once, bf16 rounds as float32 does in another order of summation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fast_cases import INT8, Convolution, Layer, example, in_float64, quantized, ulps
from qsim_fast import bf16, int8
from qsim_fast.kernels import native
from torch import Tensor, nn

import qsim_core as qsim


def simulated(
    model: nn.Module, x: Tensor, arithmetic: str = "auto", keep: bool = True, **parts: Any
) -> tuple[Tensor, str]:
    """The output of the model for `x`, and the arithmetic of its first site."""
    recipe = qsim.Recipe(arithmetic=arithmetic, **parts)  # type: ignore[arg-type]
    simulation = qsim.simulate(copy.deepcopy(model), recipe, example=x, keep=keep)
    with torch.no_grad():
        return simulation.model(x), simulation.audit().sites[0].arithmetic


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "python"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "addmm"])
@pytest.mark.parametrize(("weights", "activations"), INT8)
def test_int8_is_within_two_ulps_of_float64(weights: str, activations: str, transposed: bool, kernels: bool) -> None:
    layer, x = Layer(transposed=transposed), example()
    rows = layer.weight.T if transposed else layer.weight
    with native.only(kernels):
        y, arithmetic = simulated(layer, x, "int8", weights=weights, activations=activations)
        exact = in_float64(activations, x) @ in_float64(weights, rows.detach()).T

    assert arithmetic == "int8"
    assert ulps(y, (exact + layer.bias.detach().double()).view(y.shape)) <= 2  # type: ignore[union-attr]


@pytest.mark.parametrize(("weights", "activations"), INT8)
def test_int8_is_float32_but_for_its_roundings(weights: str, activations: str) -> None:
    y, plain = (
        simulated(Layer(), example(), arithmetic, weights=weights, activations=activations)[0]
        for arithmetic in ("int8", "float32")
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
    a, b = (int8.encode_rows(qsim.parse("token(int8)"), operand) for operand in (x, w))
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

    assert torch.equal(model.weight, quantized("channel(int4)", Layer().weight.detach()))


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
def test_nan_spreads_as_in_float32(where: str) -> None:
    layer, x = Layer(), example()
    with torch.no_grad():
        (x[0, 0] if where == "row" else layer.weight[3])[7] = torch.nan

    y, plain = (
        simulated(layer, x, arithmetic, weights="int8", activations="int8")[0] for arithmetic in ("int8", "float32")
    )
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
def test_bf16_is_float32_but_for_the_order_of_summation(
    weights: str, activations: str, bias: bool, kernels: bool
) -> None:
    layer, x, parts = Layer(bias=bias), example(), {"weights": weights, "activations": activations, "outputs": "bf16"}
    with native.only(kernels):
        y, arithmetic = simulated(layer, x, "bf16", **parts)
        plain, _ = simulated(layer, x, "float32", **parts)

    different = y != plain
    step = torch.ldexp(torch.ones_like(plain), torch.frexp(plain).exponent - 8)
    assert arithmetic == "bf16"
    assert different.float().mean() < 0.01
    assert bool(((y - plain).abs()[different] <= step[different]).all())


def test_a_bias_is_added_before_the_rounding() -> None:
    layer, x = Layer(rows=1), torch.zeros(1, 1, 96)
    with torch.no_grad():
        layer.bias.fill_(1.00390625 + 2.0**-20)  # type: ignore[union-attr]  # past half a bfloat16 step above 1

    y, arithmetic = simulated(layer, x, "bf16", weights="mxfp4", activations="mxfp4", outputs="bf16")
    assert (y.item(), arithmetic) == (1.0078125, "bf16")


CONVOLUTIONS = [
    Convolution(2, padding=1),
    Convolution(2, bias=False, padding="same"),
    Convolution(2, stride=2, padding=1, groups=2, bias=False),
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

    y, arithmetic = simulated(model, x, "bf16", keep=keep, **parts)
    slow, _ = simulated(model, x, "float32", keep=keep, **parts)

    assert arithmetic == "bf16" and y.is_contiguous()
    assert float((y != slow).double().mean()) < 0.01
    assert torch.allclose(y, slow, rtol=2**-7, atol=1e-3)


def test_a_bias_that_every_tap_would_lose_at_an_edge_takes_float32() -> None:
    x = torch.randn(2, 8, 8, 8)
    parts = {"weights": "mx(e4m3, n=8)", "activations": "mx(e4m3, n=8)", "outputs": "bf16"}

    arithmetics = [
        simulated(Convolution(2, taps=1, padding=1, bias=bias), x, "bf16", **parts)[1] for bias in (True, False)
    ]

    assert arithmetics == ["float32", "bf16"]


def test_in_parts_is_the_bias() -> None:
    bias = torch.randn(100) * torch.randn(100).exp2()

    parts = bf16.in_parts(bias)
    assert parts is not None and torch.equal(parts.double().sum(-1).float(), bias)


def test_values_that_bfloat16_matmuls_would_flush_stay_in_float32() -> None:
    layer, x = Layer(bias=False), example() * 2.0**-80

    _, arithmetic = simulated(layer, x, "bf16", weights="mxfp4", activations="mxfp4", outputs="bf16")
    assert arithmetic == "float32"


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
def test_what_is_exact_in_no_other_arithmetic_stays_in_float32(parts: dict[str, Any]) -> None:
    assert simulated(Layer(), example(), **parts)[1] == "float32"


def test_an_arithmetic_that_is_named_is_the_only_other_one() -> None:
    parts = {"weights": "channel(int4, rule=ceil)", "activations": "token(int8, rule=floor)", "outputs": "bf16"}

    assert [simulated(Layer(), example(), arithmetic, **parts)[1] for arithmetic in ("int8", "bf16", "float32")] == [
        "int8",
        "bf16",
        "float32",
    ]


def test_a_training_model_stays_in_float32() -> None:
    layer = Layer().train()

    assert simulated(layer, example(), "int8", weights="int8", activations="int8")[1] == "int8"  # the audit evaluates
    simulation = qsim.simulate(layer, qsim.Recipe(arithmetic="int8", weights="int8", activations="int8"))  # type: ignore[arg-type]
    with torch.no_grad():
        simulation.model(example())
    assert simulation.audit().sites[0].arithmetic == "float32"


def test_one_column_stays_in_float32() -> None:
    assert simulated(Layer(columns=1), torch.randn(4, 1), "int8", weights="int8", activations="int8")[1] == "float32"


@pytest.mark.parametrize("shape", [(1,), (), (51, 1), (51, 40)], ids=str)
def test_what_is_added_to_addmm_is_a_row_or_takes_float32(shape: tuple[int, ...]) -> None:
    class Added(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, 96), self.weight.T)  # type: ignore[arg-type]

    layer = Added()
    layer.bias = nn.Parameter(torch.ones(shape))
    y, arithmetic = simulated(layer, example(), "int8", weights="int8", activations="int8")

    assert arithmetic == "float32" and torch.allclose(
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
    y, plain = (simulated(Both(), example(), arithmetic, keep, **parts)[0] for arithmetic in ("bf16", "float32"))

    assert torch.allclose(y, plain, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("arithmetic", ["int8", "bf16"])
def test_what_was_made_in_inference_mode_serves_without_it(arithmetic: str) -> None:
    parts = {"weights": "channel(int4, rule=ceil)", "activations": "token(int8, rule=floor)", "outputs": "bf16"}
    simulation = qsim.simulate(Layer(), qsim.Recipe(arithmetic=arithmetic, **parts))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("arithmetic", ["int8", "float32"])
def test_a_parameter_that_got_anothers_address_is_not_taken_for_it(arithmetic: str) -> None:
    layer, x = Layer(), example()
    simulation = qsim.simulate(layer, qsim.Recipe(arithmetic=arithmetic, weights="int8", activations="int8"))  # type: ignore[arg-type]
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


def test_a_gradient_takes_float32() -> None:
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


class Counting(native.CpuKernels):
    """The kernels of this machine, which count the matrices that they turn into int8 codes."""

    count = 0

    def round(self, x: Tensor, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.count += out.dtype == torch.int8
        return super().round(x, out, *args, **kwargs)


def test_layers_with_the_same_input_share_its_codes() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(x) + self.k(x) + self.v(x))  # type: ignore[no-any-return]

    model, x = Attention(), torch.randn(20, 32)
    built = native.load(build=True)
    assert built is not None
    kernels = Counting(built.raw)
    qsim.simulate(model, qsim.Recipe(arithmetic="int8", weights="int8", activations="int8"), example=x)  # type: ignore[arg-type]
    with native.only(kernels), torch.no_grad():
        model(x)
        before = kernels.count
        model(x)

    assert kernels.count - before == 2  # the input of q, k and v, and that of o


class Shared(nn.Module):
    """A linear layer and a product of activations that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x), torch.matmul(x, x.transpose(-1, -2))], -1)


@pytest.mark.parametrize("arithmetic", ["int8", "int8_blocks", "bf16", "auto"])
def test_an_input_that_unlike_products_share_is_lowered_for_each(arithmetic: str) -> None:
    parts = {"weights": "int4", "activations": "int8", "outputs": "cast(bf16)"}

    with native.only(True):
        y, _ = simulated(Shared(), example(), arithmetic, **parts)

    plain, _ = simulated(Shared(), example(), "float32", **parts)
    assert torch.allclose(y, plain, rtol=0.02, atol=0.01 * float(plain.abs().max()))
