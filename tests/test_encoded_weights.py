"""`encoded()` gives each weight's codes and scales, which decode to what the site multiplies, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.quantizers.scales import Scales

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
SCHEMES = [
    "int4",
    "block(int4, 4, symmetric=false)",
    "nvfp4",
    "mxfp4",
    "block(e4m3, [2, 4])",
    "tensor(int8)",
    "cast(bf16)",
]


class Experts(nn.Module):
    """Three experts, of which the model multiplies by two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight[2] + x @ self.weight[0]


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))


def multiplied(model: nn.Module, **recipe: Any) -> tuple[qsim.Simulation, dict[str, Tensor]]:
    """Simulate a model, and look at the weights that its sites multiply."""
    simulation, seen = qsim.simulate(model, example=X, **recipe), {}

    def observe(site: Any, role: str, before: Tensor, after: Tensor, quantizer: Any) -> None:
        if role == "weight":
            seen.setdefault(site.weight, []).append(after)

    simulation.audit(observer=observe)
    return simulation, {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("weights", SCHEMES)
def test_the_codes_decode_to_what_the_site_multiplies(weights: str) -> None:
    simulation, values = multiplied(layers(), weights=weights)

    encoded = simulation.encoded()

    assert {name: torch.equal(encoded[name].decode(), value) for name, value in values.items()} == {
        "0.weight": True,
        "2.weight": True,
    }


@pytest.mark.parametrize("weights", SCHEMES)
def test_experts_are_encoded_together(weights: str) -> None:
    simulation, values = multiplied(Experts(), weights=weights)

    decoded = simulation.encoded()["weight"].decode()

    assert torch.equal(torch.cat([decoded[2].T, decoded[0].T]), values["weight"])


@pytest.mark.parametrize("weights", [scheme for scheme in SCHEMES if "bf16" not in scheme])
@pytest.mark.parametrize("method", ["gptq", "gptq(act_order=true)"])
@pytest.mark.parametrize("make", [layers, Experts])
def test_the_codes_of_a_pinned_weight_are_those_of_the_transform(weights: str, method: str, make: Any) -> None:
    pytest.importorskip("qsim_gptq")
    model = make()
    simulation = qsim.simulate(model, weights=weights, transforms=[method], calibration=[X])

    encoded = simulation.encoded()

    assert encoded and all(torch.equal(one.decode(), model.get_parameter(name)) for name, one in encoded.items())


class Halve(qsim.Transform):
    """Puts a weight on a grid of halves, and gives its scales or not."""

    name = "halve"
    known: bool = True

    def apply(self, model: nn.Module, context: qsim.Context) -> None:
        for weight in context.weights():
            weight.parameter.copy_(weight.parameter.mul(2).round().clamp(-7, 7) / 2)
            context.pin(weight, Scales(torch.tensor([[0.5]]), None) if self.known else None)


def test_scales_are_those_that_the_transform_gives() -> None:
    simulation = qsim.simulate(layers(), weights="int4", transforms=[Halve()], example=X)

    encoded = simulation.encoded()["2.weight"].encoded

    assert encoded.scales.unique().tolist() == [0.5]  # type: ignore[union-attr]


def test_learned_steps_are_the_scales() -> None:
    simulation = qsim.simulate(layers(), weights="channel(int4, gradient=lsq)", example=X)
    steps = simulation.model.get_parameter("2.qsim_steps.weight:weight")

    encoded = simulation.encoded()["2.weight"].encoded

    assert torch.equal(encoded.scales, steps.squeeze(-1))


def test_a_convolution_has_the_layout_of_its_rows() -> None:
    model = nn.Conv1d(4, 6, 3, groups=2)
    simulation = qsim.simulate(model, weights="block(int4, 2)", example=torch.randn(1, 4, 9))

    weight = simulation.encoded()["weight"]

    assert (weight.encoded.codes.shape, weight.decode().shape) == ((2, 3, 6), model.weight.shape)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(8, 8, bias=False)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) @ self.square.weight


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "recipe", "name", "reason"),
    [
        (layers, {"weights": torch.round}, "0.weight", r"function\(round\) has no codes"),
        (layers, {"weights": "int4", "transforms": [Halve(known=False)]}, "0.weight", "its scales are not known"),
        (Reused, {"weights": "int4"}, "square.weight", "it is multiplied along two axes"),
        (Reused, {"weights": "int4"}, "unused.weight", "the example does not reach it"),
        (Normed, {"weights": "int4"}, "linear.parametrizations.weight.original1", "it is computed from the parameter"),
    ],
)
def test_a_weight_without_codes_says_why(model: Any, recipe: dict[str, Any], name: str, reason: str) -> None:
    weight = qsim.simulate(model(), example=X, **recipe).encoded()[name]

    with pytest.raises(qsim.QsimError, match=f"^{name} cannot be encoded: .*{reason}"):
        weight.decode()


def test_codes_need_an_example() -> None:
    with pytest.raises(qsim.QsimError, match="give simulate an example"):
        qsim.simulate(layers(), weights="int4").encoded()


class Encodes(qsim.Transform):
    """Keeps the codes that the weights have when it is applied, and changes the sites, so that it did something."""

    name = "encodes"
    found: Any = None

    def apply(self, model: nn.Module, context: qsim.Context) -> None:
        self.found.update(context.encoded())
        for weight in context.weights():
            weight.site.fixed["output"] = None


@pytest.mark.parametrize("weights", SCHEMES)
@pytest.mark.parametrize("before", [[], ["gptq"]])
@pytest.mark.parametrize("make", [layers, Experts])
def test_a_transform_is_given_the_codes_that_the_simulation_will_have(
    weights: str, before: list[Any], make: Any
) -> None:
    if before:
        pytest.importorskip("qsim_gptq")
    found: dict[str, qsim.EncodedWeight] = {}
    simulation = qsim.simulate(make(), weights=weights, transforms=[*before, Encodes(found=found)], calibration=[X])

    later = simulation.encoded()

    assert found.keys() == later.keys() != set()
    assert all(torch.equal(found[name].decode(), weight.decode()) for name, weight in later.items())


def test_asking_for_codes_overwrites_no_weight() -> None:
    found: dict[str, qsim.EncodedWeight] = {}
    model = layers()
    before = model[0].weight.detach().clone()  # type: ignore[index]

    qsim.simulate(model, weights="int4", transforms=[Encodes(found=found)], example=X, keep=False)

    assert torch.equal(model[0].weight, before)  # type: ignore[index]
    assert torch.equal(found["0.weight"].decode(), qsim.parse("channel(int4)").quantize(before))
