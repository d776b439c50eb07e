"""AWQ against its formulas, and for what it promises."""

from __future__ import annotations

import copy

import pytest
import torch
from families import make, tokens
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite
from qsim_core.testing import both_ways as both_ways

BATCHES = [{"input_ids": tokens(seed), "use_cache": False} for seed in range(4)]


def uneven() -> tuple[nn.Module, Tensor]:
    """A norm and two linears, and inputs; three channels of the norm are ten to thirty times the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6)).requires_grad_(False)
    model[0].weight[[2, 5, 11]] = torch.tensor([10.0, 20.0, 30.0])
    return model, torch.randn(64, 16)


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama", "gpt2"])
def test_without_clipping_the_function_stays(family: str) -> None:
    exact, model = make(family), make(family)

    simulation = qsim.simulate(model, weights="int3", transforms=["awq(clip=false)"], calibration=BATCHES)
    simulation.sites.quantizing = False

    with torch.no_grad():
        a, b = model(**BATCHES[0]).logits, exact(**BATCHES[0]).logits
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert any(report.after is not None for report in simulation.reports)


@pytest.mark.usefixtures("both_ways")
def test_the_scales_are_the_best_of_the_search_written_out() -> None:
    (plain, x), (model, _) = uneven(), uneven()
    quantizer = qsim.parse("block(int3, 8)")

    qsim.simulate(model, weights=quantizer, transforms=["awq(clip=false)"], calibration=[x])

    hidden = plain[0](x)  # type: ignore[operator]
    weight = plain[1].weight  # type: ignore[union-attr]
    best = (float("inf"), torch.empty(0))
    for step in range(20):
        s = hidden.abs().mean(0).pow(step / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        error = hidden @ (quantizer.quantize(weight * s) / s - weight).T
        best = min(best, (float(error.square().sum()), s), key=lambda pair: pair[0])
    assert torch.allclose(plain[0].weight / model[0].weight, best[1], rtol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize(("curve", "scaled"), [(nn.ReLU(), {"0.weight"}), (nn.GELU(), set())])
def test_a_relu_lets_scales_through_and_a_gelu_does_not(curve: nn.Module, scaled: set[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), curve, nn.Linear(12, 6))

    simulation = qsim.simulate(model, weights="int3", transforms=["awq"], calibration=[torch.randn(32, 8)])

    assert {r.layer for r in simulation.reports if r.note.startswith("α = ")} == scaled


@pytest.mark.usefixtures("both_ways")
def test_clipping_makes_the_error_of_the_outputs_smaller() -> None:
    model, x = nn.Linear(16, 4), torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 0.01
    with torch.no_grad():
        model.weight[3, 7] = 1.0  # alone in its block, and hardly ever used

    simulation = qsim.simulate(model, weights="block(int3, 8)", transforms=["awq"], calibration=[x])

    (clipped,) = simulation.reports
    assert clipped.after < clipped.before  # type: ignore[operator]
    assert model.weight[3, 7] < 0.7


def test_the_error_after_clipping_counts_what_was_clipped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 48, bias=False)).eval()
    exact, x = copy.deepcopy(model), torch.randn(400, 64)

    simulation = qsim.simulate(model, weights="channel(int3)", transforms=["awq"], calibration=[x])

    with torch.no_grad():
        error = float((model(x) - exact(x)).norm() / exact(x).norm())
    assert simulation.reports[-1].measure == "relative error of the outputs"
    assert simulation.reports[-1].after == pytest.approx(error, rel=1e-3)


def test_weights_that_make_q_and_k_are_not_clipped() -> None:
    simulation = qsim.simulate(make("opt"), weights="int3", transforms=["awq"], calibration=BATCHES)

    clipped = {r.layer for r in simulation.reports if r.measure == "relative error of the outputs"}
    assert not any("q_proj" in name or "k_proj" in name for name in clipped)
    assert {"fc1", "fc2", "v_proj", "out_proj"} <= {name.split(".")[-2] for name in clipped}


@pytest.mark.parametrize("weights", ["block(int4, 16)", "mxfp4", "nvfp4", "nf4", "block(int4, 32, symmetric=false)"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_it_works_with_any_quantizer_and_helps(weights: str, family: str) -> None:
    model = make(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[[3, 17]] *= 20

    simulation = qsim.simulate(model, weights=weights, transforms=["awq"], calibration=BATCHES)

    errors = [(report.before, report.after) for report in simulation.reports if report.after is not None]
    assert len(errors) > 12
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)  # type: ignore[misc]


class TestAwq(TransformSuite):
    text = "awq"
