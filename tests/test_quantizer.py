"""`Scaled`: its granularities, special values, dtypes and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import QuantizerSuite

SCHEMES = (
    "tensor(int4)",
    "channel(int8)",
    "token(e4m3)",
    "block(int4, 16)",
    "abfp(int4, n=64)",
    "abfp(e2m1, n=7, scale=e4m3)",
    "scaled(int4, 16, scaled(e4m3, tensor))",
    "scaled(int4, 16, scaled(int8, channel))",
    "cast(bf16)",
    "e5m2",
    "at_scale(int8, 0.02)",
    "block(e2m1, 16, scale=at_scale(e4m3, 0.002))",
    "int6",
)


class TestSchemes(QuantizerSuite):
    text = SCHEMES


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written_out(x: Tensor, block: int, largest: int) -> Tensor:
    """One element after another."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        cells = []
        for start in range(0, len(row), block):
            part = row[start : start + block]
            scale = part.abs().max() / largest
            cells += [(v / scale).round().clamp(-largest, largest) * scale if scale else v * 0 for v in part]
        rows.append(torch.stack(cells))
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize(("block", "size"), [("tensor", 40), ("channel", 20), ("token", 20), (8, 8), (7, 7), (64, 20)])
def test_each_granularity_shares_a_scale_over_its_block(block: str | int, size: int) -> None:
    x = noise(2, 20)

    y = qsim.parse(f"scaled(int4, {block})")(x)

    expected = written_out(x.reshape(1, -1), size, 7).reshape(2, 20) if block == "tensor" else written_out(x, size, 7)
    assert torch.equal(y, expected)


def test_a_scale_is_rounded_by_any_quantizer() -> None:
    x = noise(4, 64)
    exact = x.reshape(4, 4, 16).abs().amax(-1) / 7
    scale = qsim.parse("scaled(e4m3, tensor)")(exact).unsqueeze(-1)

    y = qsim.parse("scaled(int4, 16, scaled(e4m3, tensor))")(x)

    assert torch.equal(y, ((x.reshape(4, 4, 16) / scale).round().clamp(-7, 7) * scale).reshape(4, 64))


def test_a_scale_that_rounds_to_zero_makes_its_block_zero() -> None:
    x = torch.tensor([[1e-6, -3e-6, 2e-6, 0.0], [1.0, 2.0, 3.0, 7.0]])

    y = qsim.parse("scaled(int4, 4, scale=e4m3)")(x)

    assert torch.equal(y, torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 7.0]]))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_nan_or_inf_becomes_nan_and_the_others_do_not(special: float) -> None:
    x = torch.full((2, 8), 7.0)
    x[0, 2] = special

    y = qsim.parse("abfp(int4, n=4)")(x)

    assert y[0, :4].isnan().all()
    assert torch.equal(y[0, 4:], torch.full((4,), 7.0))
    assert torch.equal(y[1], x[1])


@pytest.mark.parametrize("scale", ["e5m2", "cast(e5m2)"])
def test_a_scale_too_large_for_its_format_saturates(scale: str) -> None:
    x = torch.tensor([[7e6, 1e6]])

    assert torch.equal(qsim.parse(f"scaled(int4, 2, scale={scale})")(x), torch.tensor([[7.0, 7.0]]) * 57344)


@pytest.mark.parametrize("element", ["e5m2", "e3m4", "binary8p3", "e4m3(saturate=false)"])
@pytest.mark.parametrize("scheme", ["mx({})", "block({}, 32, scale=float(8, 1, specials=ieee))"])
def test_an_element_saturates_under_a_scale_even_if_it_overflows_alone(element: str, scheme: str) -> None:
    x, quantizer = noise(64, 64), qsim.parse(scheme.format(element))
    scale, _ = quantizer.scale_map(x)
    beyond = x.abs() / scale > (quantizer.element.max + quantizer.element.beyond) / 2

    y = quantizer(x)

    assert beyond.any()
    assert torch.equal(y[beyond], torch.copysign(scale * quantizer.element.max, x)[beyond])
    assert torch.equal(quantizer.decode(quantizer.encode(x)), y)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("channel(codebook([-2, -1, 0]))", "channel: codebook([-2.0, -1.0, 0.0]) goes from -2 to 0, and a scale maps the largest magnitude to 0; give it larger values above zero"),
        ("tensor(codebook([-3, -2, -1]))", "tensor: codebook([-3.0, -2.0, -1.0]) goes from -3 to -1, and a scale maps the largest magnitude to -1"),
        ("block(codebook([-8, 0.001]), 8)", "block: codebook([-8.0, 0.001]) goes from -8 to 0.001, and a scale maps the largest magnitude to 0.001"),
        ("abfp(int4, scale=cast(int8))", "abfp: cast(int8) as a scale needs a scale of its own, like scaled(int8, channel)"),
        ("block(e2m1, 16, scale=channel(e4m3, gradient=lsq))", "block: channel(e4m3, gradient=lsq) as a scale can hold one static scale, that of the tensor, and learns none"),
        ("at_scale(int8, 1e-50)", "at_scale: scale: not a normal number of float32, from 1.2e-38 to 3.4e+38: 1e-50"),
        ("abfp(int4, scale=int16)", "abfp: int16 as a scale needs a scale of its own, like scaled(int16, channel)"),
        ("abfp(int4, scale=e2m1)", "abfp: e2m1 as a scale needs a scale of its own, like scaled(e2m1, channel)"),
        ("mx(int(4, convention=power_of_two))", "mx: rule floor cannot follow the convention of int(4, convention=power_of_two); leave the convention out"),
        ("channel(int(4, narrow=false, convention=gptq), symmetric=false)", "channel: a zero point cannot follow the convention of int(4, narrow=false, convention=gptq)"),
    ],
)  # fmt: skip
def test_what_cannot_work_together_is_refused(text: str, message: str) -> None:
    with pytest.raises(qsim.SpecError) as error:
        qsim.parse(text)

    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("last", "accepted"), [(2.0**16, False), (2.0**17, True)])
def test_a_format_can_be_a_scale_as_it_is_if_its_values_span_enough(last: float, accepted: bool) -> None:
    class Steps(qsim.Format):
        """0, 1, and one more."""

        name = "steps"

        def table(self) -> Tensor:
            return torch.tensor([0.0, 1.0, last])

    host = qsim.Host()
    host.register(Steps)

    if accepted:
        assert host.parse("abfp(int4, scale=steps)").scale == Steps()
    else:
        with pytest.raises(qsim.SpecError, match=r"steps as a scale needs a scale of its own, like scaled\(steps, ch"):
            host.parse("abfp(int4, scale=steps)")


def test_a_tile_needs_rows() -> None:
    with pytest.raises(qsim.QsimError) as error:
        qsim.parse("block(int4, [2, 4])")(torch.ones(8))

    assert str(error.value) == (
        "block(int4, n=[2, 4]) shares scales over rows and columns; a tensor of shape (8,) has no rows"
    )


def test_half_precision_is_computed_in_float32_and_rounded_once() -> None:
    x = noise(8, 64).bfloat16()

    assert torch.equal(qsim.parse("abfp(int4)")(x), qsim.parse("abfp(int4)")(x.float()).bfloat16())


def test_an_integer_tensor_is_refused() -> None:
    with pytest.raises(qsim.QsimError, match=r"^a quantizer takes floating-point tensors, not torch.int64$"):
        qsim.parse("abfp(int4)")(torch.arange(4))


def test_the_straight_through_gradient_passes_up_to_half_a_step_beyond_the_largest_value() -> None:
    x = torch.tensor([0.0, 7.0, -7.4, 7.5, 7.6, -9.0], requires_grad=True)

    qsim.parse("int4")(x).backward(torch.arange(1.0, 7.0))

    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0]))  # type: ignore[arg-type]


def test_a_scale_rounded_down_does_not_stop_the_gradient_of_the_largest_value() -> None:
    x = noise(64, 64).requires_grad_()
    abfp = qsim.parse("abfp(int4)")
    rounded_down = x.detach().abs().amax(-1) / abfp.scale(x.detach().abs().amax(-1) / 7) > 7

    abfp(x).sum().backward()

    assert rounded_down.any()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


def test_the_gradient_is_zero_where_a_scale_leaves_an_element_far_outside() -> None:
    x = torch.tensor([[1e6, 1.0]], requires_grad=True)

    qsim.parse("scaled(int4, 2, scale=e4m3)")(x).sum().backward()

    assert torch.equal(x.grad, torch.tensor([[0.0, 1.0]]))  # type: ignore[arg-type]


def test_the_gradient_comes_back_in_the_tensors_own_dtype() -> None:
    x = noise(4, 16).bfloat16().requires_grad_()

    qsim.parse("abfp(int4, n=8)")(x).sum().backward()

    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


def test_bits_count_the_scales() -> None:
    shape = torch.Size([8, 128])

    def bits(text: str) -> float | None:
        return qsim.parse(text).bits_per_element(shape)  # type: ignore[no-any-return]

    assert bits("tensor(int4)") == 4 + 32 / 1024
    assert bits("channel(int4, scale=bf16)") == 4 + 16 / 128
    assert bits("block(int4, 32)") == 4 + 32 / 32
    assert bits("scaled(int4, 64, scaled(int8, channel))") == 4 + (8 + 32 / 2) / 64
    assert bits("cast(bf16)") == 16


def test_a_callable_may_work_in_place() -> None:
    model, x = torch.nn.Linear(4, 4), torch.randn(2, 4) * 3
    before = x.clone(), model.weight.detach().clone()

    simulation = qsim.simulate(model, weights=lambda t: t.clamp_(-0.1, 0.1), activations=lambda t: t.clamp_(-1, 1))
    model(x)

    assert torch.equal(x, before[0])
    assert torch.equal(simulation.restore().weight, before[1])


def test_a_callable_is_a_quantizer_wherever_one_is_expected() -> None:
    recipe = qsim.Recipe(weights=torch.trunc)  # type: ignore[arg-type]

    assert str(recipe.weights) == "function(trunc)"
    assert torch.equal(recipe.weights(torch.tensor([1.7])), torch.tensor([1.0]))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.sum(), r"turned a tensor \(2, 3\) torch.float32 into \(\) torch.float32; shape and dtype must stay"),
        (lambda x: x.double(), r"turned a tensor \(2, 3\) torch.float32 into \(2, 3\) torch.float64; shape and dtype must stay"),
        (lambda x: None, r"turned a tensor \(2, 3\) torch.float32 into 'NoneType'; shape and dtype must stay"),
    ],
)  # fmt: skip
def test_a_callable_that_changes_shape_or_dtype_is_refused(function: object, message: str) -> None:
    quantizer = qsim.Recipe(weights=function).weights  # type: ignore[arg-type]

    with pytest.raises(qsim.QsimError, match=message):
        quantizer(torch.ones(2, 3))  # type: ignore[misc]


@pytest.mark.parametrize("found", [torch.ones(1), torch.ones(2, 1), torch.ones(3, 2).T.double(), None])
def test_a_quantizer_that_changes_shape_or_dtype_is_refused_and_not_broadcast(found: Tensor | None) -> None:
    class Careless(qsim.Quantizer):
        name = "careless"

        def quantize(self, x: Tensor) -> Tensor:
            return found  # type: ignore[return-value]

    simulated = nn.Linear(3, 2)
    qsim.simulate(simulated, activations=Careless())

    for call in (Careless().quantize, Careless(), simulated):
        with pytest.raises(qsim.QsimError, match=r"^careless turned a tensor \(2, 3\) torch.float32 into "):
            call(torch.ones(2, 3))


@pytest.mark.parametrize(
    "text",
    [
        "channel(int4)",
        "channel(int4, symmetric=false)",
        "abfp(int4, n=7)",
        "block(e4m3, [2, 5])",
        "nvfp4",
        "tensor(e2m1)",
    ],
)
def test_rounding_at_the_scales_of_a_tensor_is_quantizing_it(text: str) -> None:
    x, scheme = noise(6, 33), qsim.parse(text)

    scale, zero = scheme.scale_map(x)

    assert scale.shape == x.shape
    assert torch.equal(scheme.round_at(x, scale, zero), scheme(x))
    assert torch.equal(scheme.round_at(x[:, 3], scale[:, 3], None if zero is None else zero[:, 3]), scheme(x)[:, 3])
