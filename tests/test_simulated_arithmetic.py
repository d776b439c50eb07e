"""An arithmetic says how a product is multiplied and added up: a third party's device in a few lines."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qsim_core as qsim


class Whole(qsim.Quantizer):
    """Whole numbers."""

    name = "whole"

    def quantize(self, x: Tensor) -> Tensor:
        return x.round()


class Truncated(qsim.Arithmetic):
    """Products of whole numbers, `times` as large, without their fraction."""

    name = "truncated"
    times: int = 1

    def check(self, quantizers: Sequence[Any]) -> None:
        if not all(isinstance(quantizer, Whole) for quantizer in quantizers):
            raise qsim.RecipeError("it takes whole on both operands")

    def multiply(self, left: qsim.QuantizedRows, right: qsim.QuantizedRows) -> Tensor:
        return (self.times * (left.values @ right.values.transpose(-1, -2))).trunc()


HOST = qsim.Host()
HOST.register(Whole, Truncated)


def simulated(model: nn.Module, x: Any, **recipe: Any) -> Any:
    wanted = {"activations": Whole(), "arithmetic": Truncated(times=3)} | recipe
    if any(True for _ in model.parameters()):
        wanted.setdefault("weights", Whole())
    simulation = qsim.simulate(model, **wanted)
    with torch.no_grad():
        return model(x), simulation


def filled(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.constant_(parameter, 1.4)
    return module


@pytest.mark.parametrize("layer", [nn.Linear(4, 2), Conv1D(2, 4), nn.Conv2d(4, 2, 1)])
def test_the_bias_is_added_to_what_the_arithmetic_gives(layer: nn.Module) -> None:
    x = torch.full((1, 4, 1, 1) if isinstance(layer, nn.Conv2d) else (1, 4), 0.6)

    y, _ = simulated(filled(layer), x)

    assert y.flatten().tolist() == pytest.approx([12 + 1.4] * 2)  # 3 x 4 x 1 x 1, and the bias as it is


class Masked(nn.Module):
    """A product of activations, with a mask."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(torch.full((1, 2, 2), 0.25), x, x, beta=2, alpha=1)


def test_products_of_activations_too_and_a_mask_after_the_output_is_rounded() -> None:
    y, simulation = simulated(Masked(), torch.full((1, 2, 2), 1.2), outputs=lambda x: x + 100)

    assert y.flatten().tolist() == [6 + 100 + 0.5] * 4
    assert [site.arithmetic for site in simulation.audit().sites] == ["truncated(3)"]


def test_with_the_numbers_of_vectors() -> None:
    class Vectors(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x @ x[0], x[0] @ x, x[0] @ x[1]

    y, _ = simulated(Vectors(), torch.full((3, 3), 2.3))

    assert [part.tolist() for part in y] == [[36] * 3, [36] * 3, 36]


def test_a_product_of_nothing_is_zero() -> None:
    class Emptied(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ x.transpose(-1, -2), x.transpose(-1, -2) @ x

    y, _ = simulated(Emptied(), torch.ones(2, 0))

    assert y[0].tolist() == [[0, 0], [0, 0]]
    assert y[1].shape == (0, 0)


def test_it_goes_where_a_copy_of_the_model_goes() -> None:
    layer, x = filled(nn.Linear(4, 2)), torch.full((1, 4), 0.6)
    y, _ = simulated(layer, x)

    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            assert torch.equal(other(x), y)


def test_its_gradient_is_the_float_products() -> None:
    layer, x = filled(nn.Linear(4, 2)), torch.full((1, 4), 0.6, requires_grad=True)
    qsim.simulate(layer.train(), weights=Whole(), activations=Whole(), arithmetic=Truncated())

    layer(x).sum().backward()

    assert x.grad.tolist() == [[2, 2, 2, 2]]  # type: ignore[union-attr]
    assert layer.weight.grad.tolist() == [[1] * 4] * 2


def test_an_override_has_an_arithmetic_of_its_own_and_a_recipe_says_it_in_text() -> None:
    model = nn.Sequential(filled(nn.Linear(4, 2)), filled(nn.Linear(2, 1)))
    text = "{weights: whole, activations: whole, arithmetic: truncated(3), overrides: {'1': {arithmetic: float32}}}"
    recipe = qsim.Recipe.from_yaml(text, HOST)

    with torch.no_grad():
        simulation = qsim.simulate(model, recipe, host=HOST)
        y = model(torch.full((1, 4), 0.6))

    assert [site.arithmetic for site in simulation.audit().sites] == ["truncated(3)", "float32"]
    assert y.item() == pytest.approx(13 + 13 + 1.4)
    assert qsim.Recipe.from_yaml(recipe.to_yaml(), HOST) == recipe


@pytest.mark.parametrize(
    ("other", "stand"), [(None, "no quantizer and whole"), ("int8", "token(int8) and whole")]
)  # fmt: skip
def test_formats_that_it_cannot_multiply_are_an_error_before_anything_is_quantized(other: Any, stand: str) -> None:
    layers = nn.Sequential(nn.Linear(4, 2))

    with pytest.raises(qsim.RecipeError) as error:
        qsim.simulate(
            layers, weights=Whole(), activations=other, arithmetic=Truncated(times=3), example=torch.ones(1, 4)
        )

    assert str(error.value) == f"0: truncated(3) cannot multiply {stand}: it takes whole on both operands"


class Products(nn.Module):
    """Two products of activations."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


def test_products_of_activations_are_an_error_in_the_first_forward() -> None:
    """A product may get an alias, and with it other quantizers, until then."""
    model, x = Products(), torch.ones(1, 3, 4)
    recipe = {"activations": Whole(), "values": "int8", "arithmetic": Truncated()}
    qsim.simulate(model, recipe, example=x)

    with pytest.raises(qsim.RecipeError) as error:
        model(x)

    assert str(error.value) == (
        ":matmul.1: truncated(1) cannot multiply whole and token(int8): it takes whole on both operands"
    )


class Contracted(nn.Module):
    """A contraction of two activations."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ij,ij->", x, x)


def test_an_einsum_is_not_a_product_of_two_matrices() -> None:
    with pytest.raises(qsim.RecipeError) as error:
        simulated(Contracted(), torch.ones(2, 2))

    assert str(error.value).endswith(
        "matmul.0: truncated(3) multiplies matrices, and this is einsum; leave it alone with skip, or name another "
        "arithmetic for it in overrides"
    )
    y, _ = simulated(Contracted(), torch.ones(2, 2), overrides={"*matmul.0": {"arithmetic": "float32"}})
    assert y == 4


@pytest.mark.parametrize("layer", [nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)])
def test_convolutions_that_are_not_computed_as_patches(layer: nn.Module) -> None:
    x, operation = torch.ones(1, 1, 2, 2, *[2] * isinstance(layer, nn.Conv3d)), type(layer).__name__.lower()

    with pytest.raises(qsim.RecipeError, match="^weight: truncated.1. multiplies matrices, and this is conv") as error:
        qsim.simulate(layer, weights=Whole(), activations=Whole(), arithmetic=Truncated(), example=x)

    assert operation[:8] in str(error.value).replace("_", "")


def test_v_has_its_scales_along_the_tokens() -> None:
    model, x = Products(), torch.ones(1, 3, 4)
    qsim.simulate(model, activations=Whole(), arithmetic=Truncated(), example=x)
    model(x)
    model = Products()
    qsim.simulate(model, {"activations": Whole(), "arithmetic": Truncated(), "value_axis": "head"}, example=x)

    with pytest.raises(
        qsim.RecipeError, match="^:matmul.1: truncated.1. adds along tokens, and v has its scales along the head$"
    ):
        model(x)


class Spread(qsim.Transform):
    """Puts weights on the grid of integers 0 to 1, and says the scales if `known`."""

    name = "spread"
    known: bool = True

    def apply(self, model: nn.Module, context: qsim.Context) -> None:
        from qsim_core.quantizers.scales import Scales

        for weight in context.weights():
            weight.parameter.copy_(torch.tensor([[0.5, 0.0, 0.5, 0.5]]))
            context.pin(weight, Scales(torch.tensor([[0.5]]), None) if self.known else None)
            context.report(weight.name)


class Codes(qsim.Accumulator):
    """The largest code of a weight, in place of a product."""

    name = "codes"
    integers = True

    def add_up(self, left: Tensor, right: Tensor) -> Tensor:
        return right.amax(-1).expand(*left.shape[:-1], -1)


def test_an_accumulator_is_given_codes_under_the_scales_that_a_transform_chose() -> None:
    """The codes are 1, and not the 127 that a scale found anew would make of them."""
    layer, x = nn.Linear(4, 1, bias=False), torch.eye(4)

    qsim.simulate(layer, weights="int8", activations="int8", arithmetic=Codes(), transforms=[Spread()], calibration=[x])

    with torch.no_grad():
        assert layer(x).flatten().tolist() == pytest.approx([1 * (1 / 127) * 0.5] * 4)


def test_an_accumulator_without_these_scales_is_an_error() -> None:
    layer, x = nn.Linear(4, 1, bias=False), torch.eye(4)
    qsim.simulate(
        layer,
        weights="int8",
        activations="int8",
        arithmetic=Codes(),
        transforms=[Spread(known=False)],
        calibration=[x],
    )

    with pytest.raises(qsim.RecipeError, match="^weight: a transform has quantized it and has not given its scales$"):
        layer(x)


@pytest.mark.parametrize(
    ("weights", "activations", "stand"),
    [
        ("int8", None, "no quantizer and channel(int8): it takes a number format on both operands"),
        ("int8", lambda x: x, "it takes a number format on both operands, alone or under scales"),
        ("e4m3", "int8", "token(int8) and channel(e4m3): it takes integers on both operands"),
    ],
)  # fmt: skip
def test_an_accumulator_of_integers_says_what_it_takes(weights: str, activations: Any, stand: str) -> None:
    with pytest.raises(qsim.RecipeError) as error:
        qsim.simulate(
            nn.Linear(4, 2), weights=weights, activations=activations, arithmetic=Codes(), example=torch.ones(1, 4)
        )

    assert str(error.value).startswith("weight: codes cannot multiply ")
    assert stand in str(error.value)


class Sums(qsim.Accumulator):
    """Sums of codes in float32."""

    name = "sums"

    def add_up(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right.transpose(-1, -2)


QUANTIZERS = [
    "tensor(int4)", "token(int8)", "token(uint8, symmetric=false)", "block(int4, 5)", "block(int4, [2, 3])", "cast(int8)",
    "token(e4m3)", "block(e2m1, 4, scale=scaled(e4m3, tensor))", "cast(bf16)",
]  # fmt: skip


@pytest.mark.parametrize("left", QUANTIZERS)
@pytest.mark.parametrize("right", ["token(int8)", "block(int4, 3)"])
def test_codes_and_scales_are_the_values_whoever_shares_a_scale(left: str, right: str) -> None:
    x, w = (4 * torch.randn(2, 5, 13, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    first = qsim.QuantizedRows.of(qsim.parse(left), x)
    second = qsim.QuantizedRows.of(qsim.parse(right), w)

    assert torch.allclose(first.units * first.scale, first.values, rtol=1e-6)
    assert torch.equal(first.units, first.element.full().quantize(first.units)) or "symmetric" in left
    exact = first.values @ second.values.transpose(-1, -2)
    assert torch.allclose(Sums().multiply(first, second), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [True, False])
def test_experts_have_scales_of_their_own(keep: bool) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.stack([torch.eye(4), 100 * torch.eye(4)]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight)

    model, x = Experts(), torch.eye(4).expand(2, 4, 4).contiguous()
    qsim.simulate(model, weights="tensor(int4)", activations="int8", arithmetic=Sums(), keep=keep, example=x)

    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(model(x), torch.stack([torch.eye(4), 100 * torch.eye(4)]), rtol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_a_weight_that_was_overwritten_keeps_its_codes(keep: bool) -> None:
    layer, x = nn.Linear(40, 8), torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(layer)
    qsim.simulate(exact, weights="int4", activations="int8")

    qsim.simulate(layer, weights="int4", activations="int8", arithmetic=Sums(), keep=keep, example=x)

    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(layer(x), exact(x), rtol=1e-4, atol=1e-5)


def test_what_a_transform_tries_is_what_the_site_computes() -> None:
    """With all operands; of one alone the product is float32's."""
    found: dict[str, Tensor] = {}

    class Trying(qsim.Transform):
        name = "trying"

        def apply(self, model: nn.Module, context: qsim.Context) -> None:
            def watch(site: Any, call: Any) -> None:
                found["site"] = context.simulated(site, call)
                found["weight"] = context.simulated(site, call, ("weight",))

            model.get_parameter("bias").zero_()
            context.observe(watch, "trying")
            context.report("bias")

    layer, x = nn.Linear(4, 2), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 9
    y, _ = simulated(layer, x, transforms=[Trying()], calibration=[x])

    assert torch.equal(found["site"], y)
    assert torch.equal(found["weight"], F.linear(x, layer.weight.round(), layer.bias))
