"""Bias correction takes out the mean of the error, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "conv1d of transformers":
        from transformers.pytorch_utils import Conv1D

        return Conv1D(6, 16), 1 + noise(40, 16)
    if kind == "convolution":
        return nn.Conv2d(4, 6, 3, padding=1, groups=2), 1 + noise(5, 4, 6, 6)
    return nn.Linear(16, 6), 1 + noise(40, 16)


@pytest.mark.parametrize("kind", ["linear", "conv1d of transformers", "convolution"])
@pytest.mark.parametrize("activations", [None, "int4"])
def test_the_mean_of_each_output_is_what_it_was(kind: str, activations: str | None) -> None:
    model, x = layer(kind)
    exact = model(x).detach()
    transform = f"bias_correction({str(activations is not None).lower()})"

    qsim.simulate(model, weights="int3", activations=activations, transforms=[transform], calibration=[x[:15], x[15:]])

    axes = [axis for axis in range(exact.dim()) if axis != (1 if kind == "convolution" else exact.dim() - 1)]
    assert torch.allclose(model(x).mean(axes), exact.mean(axes), atol=1e-5)


def test_the_report_tells_the_error_without_and_with_it() -> None:
    (plain, x), (corrected, _) = layer("linear"), layer("linear")
    exact = plain(x).detach()
    qsim.simulate(plain, weights="int3", example=x)

    simulation = qsim.simulate(corrected, weights="int3", transforms=["bias_correction"], calibration=[x])

    (report,) = simulation.reports
    errors = [((model(x).detach() - exact).norm() / exact.norm()).item() for model in (plain, corrected)]
    assert (report.layer, report.before, report.after) == (
        "bias",
        *(pytest.approx(error, rel=1e-4) for error in errors),
    )
    assert errors[1] < errors[0]


def test_static_scales_are_not_known_yet() -> None:
    with pytest.raises(qsim.RecipeError, match=r"^bias_correction\(true\) comes before the static scale of weight is"):
        qsim.simulate(
            nn.Linear(4, 4),
            weights="int3",
            activations="tensor(int8, static=true)",
            transforms=["bias_correction(true)"],
            calibration=[noise(9, 4)],
        )


def test_a_layer_without_a_bias_is_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))

    simulation = qsim.simulate(model, weights="int3", transforms=["bias_correction"], calibration=[1 + noise(9, 4)])

    assert {r.layer: r.note for r in simulation.reports} == {
        "0.weight": "left alone: it has no bias of its own",
        "1.bias": "",
    }


def test_where_no_layer_has_one_it_is_an_error() -> None:
    with pytest.raises(qsim.RecipeError, match="changed nothing in this model: left alone: it has no bias of its own"):
        qsim.simulate(
            nn.Linear(4, 4, bias=False), weights="int3", transforms=["bias_correction"], calibration=[noise(9, 4)]
        )


class Experts(nn.Module):
    """Two experts in one weight, of which the second is a hundred times as large, and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(2, 4, 6, seed=1) * torch.tensor([1.0, 100.0])[:, None, None])
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def test_each_expert_is_quantized_by_itself_as_its_site_does() -> None:
    """The correction is the mean of the errors that the site makes."""
    model, x = Experts(), 1 + noise(2, 40, 4)
    exact = model(x).detach()
    qsim.simulate(model, weights="tensor(int4)", example=x)
    with torch.no_grad():
        error = (model(x) - exact).mean((0, 1))
    corrected = Experts()

    qsim.simulate(corrected, weights="tensor(int4)", transforms=["bias_correction"], calibration=[x])

    assert torch.allclose(corrected.bias, -error, rtol=1e-4, atol=1e-4)


class TestBiasCorrection(TransformSuite):
    text = ("bias_correction", "bias_correction(true)")
