"""One gradient pass tells what each site costs: its costs add up to what the recipe does to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qsim_study.blame.gradient import Prediction, predict
from torch import Tensor, nn

import qsim_core as qsim


class Classifier(nn.Module):
    """Three layers, and the loss of labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """The logits, and the loss where there are labels."""
        logits = self.third(self.second(self.first(x).relu()).tanh())
        return SimpleNamespace(logits=logits, loss=labels is not None and nn.functional.cross_entropy(logits, labels))


X, LABELS = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 10
SAMPLES = [{"x": x, "labels": label} for x, label in zip(X, LABELS, strict=True)]


def predicted(model: nn.Module, samples: list[dict[str, Tensor]] = SAMPLES, **recipe: Any) -> Prediction:
    with qsim.simulate(model, **{"example": {"x": X}} | recipe) as simulation:
        return predict(simulation, samples, qsim.Run())


def whole(prediction: Prediction, site: str) -> float:
    return sum(prediction.parts(site).values())


@pytest.mark.parametrize(
    "recipe",
    [
        {"weights": "int6"},
        {"weights": "nvfp4"},
        {"weights": "channel(int6, range=percentile(p=98))"},
        {"weights": "int6", "activations": "int6", "arithmetic": "int12(overflow=saturate)"},
    ],
)
def test_the_costs_of_all_sites_add_up_to_the_change_of_the_loss(recipe: Mapping[str, Any]) -> None:
    model = Classifier()
    before = model(X, LABELS).loss.detach()

    found = predicted(model, **recipe)

    with qsim.simulate(model, **recipe):
        change = float(model(X, LABELS).loss.detach() - before)
    assert sum(whole(found, site) for site in found.sums) == pytest.approx(change, rel=0.15)


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ({"weights": "int4", "outputs": "bf16"}, ["element"]),
        ({"weights": "scaled(int4, 16, scale=bf16)"}, ["element", "scale", "clipping"]),
        ({"activations": "token(int4, range=mse)"}, ["element", "clipping"]),
        ({"weights": "int4", "activations": "int4", "arithmetic": "int24"}, ["element", "arithmetic"]),
    ],
)
def test_a_site_has_the_parts_that_its_quantizers_and_its_arithmetic_can_have(
    recipe: Mapping[str, Any], parts: list[str]
) -> None:
    found = predicted(Classifier(), **recipe)

    assert list(found.parts("second")) == parts


def test_values_beyond_a_range_cost_by_clipping() -> None:
    found = predicted(Classifier(), outputs="tensor(int16, range=percentile(p=70))")

    parts = found.parts("third")
    assert abs(parts["clipping"]) > 100 * abs(parts["element"])


def test_a_scale_that_is_rounded_coarsely_costs_by_its_rounding() -> None:
    model = Classifier()
    with torch.no_grad():
        model.second.weight[0] *= 100  # beside its scale those of the other rows round to zero

    found = predicted(model, weights="scaled(int8, channel, scale=tensor(int2))")

    parts = found.parts("second")
    assert abs(parts["scale"]) > 10 * abs(parts["element"])


def test_a_sum_that_overflows_costs_by_its_arithmetic() -> None:
    found = predicted(Classifier(), weights="int8", activations="int8", arithmetic="int12(overflow=wrap)")

    parts = found.parts("second")
    assert abs(parts["arithmetic"]) > 10 * abs(parts["element"])


def test_the_site_with_the_coarse_format_costs_most() -> None:
    found = predicted(Classifier(), weights="int8", overrides={"second": {"weights": "int2"}})

    assert max(found.sums, key=found.fisher) == "second"


def test_batches_of_any_size_give_the_same_costs() -> None:
    model, recipe = Classifier(), {"weights": "int4"}
    with qsim.simulate(model, example={"x": X}, **recipe) as simulation:
        one, many = (predict(simulation, SAMPLES, qsim.Run(batch_size=size)) for size in (1, 64))

    assert [whole(one, site) for site in one.sums] == pytest.approx([whole(many, site) for site in many.sums], rel=1e-3)


class Weighing(nn.Module):
    """Products whose results, weighed by the labels, are the loss: it has no curvature in any of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        """The loss of two layers that read the same input, and of a product of this input with itself."""
        squares = (x.unflatten(-1, (4, 8)) @ x.unflatten(-1, (4, 8)).transpose(-1, -2)).flatten(1).sum(-1)
        y = self.left(x).sum(-1) - 2 * self.right(x).sum(-1) + squares
        return SimpleNamespace(loss=(y * labels).mean())


@pytest.mark.parametrize(
    ("site", "reached"),
    [
        ("left", {"weights": "nvfp4", "activations": "int3"}),
        ("right", {"weights": "nvfp4", "activations": "int3"}),
        (":matmul.0", {"activations": "int3"}),
    ],
)
def test_where_the_loss_is_linear_a_site_costs_what_it_costs_alone(site: str, reached: Mapping[str, Any]) -> None:
    model, example = Weighing(), {"x": X, "labels": LABELS}
    before = model(**example).loss.detach()

    found = predicted(model, weights="nvfp4", activations="int3", example=example)

    with qsim.simulate(model, **reached, skip=[other for other in found.sums if other != site]):
        alone = float(model(**example).loss.detach() - before)
    assert whole(found, site) == pytest.approx(alone, rel=1e-2)


def test_the_model_is_as_it_was() -> None:
    model = Classifier()
    model.first.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    predicted(model, weights="int4")

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_a_loss_is_one_line() -> None:
    with pytest.raises(qsim.DataError, match=r"^the model gives a SimpleNamespace without a loss; blame needs one"):
        predicted(Classifier(), [{"x": x} for x in X], weights="int4")
