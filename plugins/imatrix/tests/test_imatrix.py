"""Scales by the second moments of inputs, against loops over rows, blocks and candidates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, columns: int) -> Tensor:
    """Make correlated columns of very different size."""
    return noise(tokens, columns, seed=1) @ noise(columns, columns, seed=2) * noise(columns, seed=3).mul(1.5).exp()


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


def simulated(weight: Tensor, x: Tensor, weights: str, text: str) -> tuple[Tensor, qsim.Simulation]:
    layer = linear(weight)
    simulation = qsim.simulate(layer, weights=weights, transforms=[text], calibration=[x])
    return layer.weight.detach(), simulation


def reference(weight: Tensor, x: Tensor, element: str, n: int, local: bool) -> Tensor:
    """Try the shares 1, 0.9, … 0.3 of the largest magnitude for each block, and keep the least weighted error."""
    quantized, moments = weight.clone(), (x.double().T @ x.double()) / len(x)
    format = qsim.parse(element)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], n):
            place = slice(start, min(start + n, weight.shape[1]))
            block, gram, least = weight[row, place], moments[place, place], torch.inf
            for step in range(8):
                scale = block.abs().max() * (1 - step / 10) / format.max
                tried = format(block / scale) * scale
                error = (tried - block).double()
                total = float(error @ gram @ error if local else gram.diagonal() @ error.square())
                if total < least:
                    least, quantized[row, place] = total, tried
    return quantized


@pytest.mark.parametrize("columns", [32, 40])
@pytest.mark.parametrize("element", ["int4", "e2m1"])
@pytest.mark.parametrize("hessian", ["diagonal", "local"])
def test_each_block_has_the_range_with_the_least_weighted_error(hessian: str, element: str, columns: int) -> None:
    weight, x = noise(6, columns), inputs(200, columns)
    text = f"imatrix(hessian={hessian}, range=mse(norm=2, steps=10))"

    found, _ = simulated(weight, x, f"block({element}, 16)", text)

    assert torch.allclose(found, reference(weight, x, element, 16, hessian == "local"), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weights", ["nvfp4_adaptive", "hif4", "mx4"])
def test_formats_that_share_their_scales_err_less_too(weights: str) -> None:
    _, simulation = simulated(noise(32, 128), inputs(400, 128), weights, "imatrix")

    (report,) = simulation.reports
    assert report.after < report.before  # type: ignore[operator]


def test_by_hand() -> None:
    """Scale 3 costs 1·1, scale 2 costs 0.01·1 + 1·1, and scale 1 costs 0.01·4: the second input is ten times the first."""
    weight, x = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.1, 1.0], [0.1, -1.0]])
    candidates = "mse(norm=2, steps=3, lowest=0)"

    plain = qsim.parse(f"channel(int2, range={candidates})")(weight)
    weighted, _ = simulated(weight, x, "channel(int2)", f"imatrix(range={candidates})")

    assert plain.tolist() == [[3.0, 0.0]]
    assert weighted[0].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("text", ["imatrix", "local_hessian", "imatrix(range=four_over_six)"])
def test_the_outputs_of_nvfp4_err_less(text: str) -> None:
    weight, x = noise(32, 64), inputs(400, 64)

    found, simulation = simulated(weight, x, "nvfp4", text)

    nearest = qsim.parse("nvfp4")(weight)
    before, after = (float((x @ (w - weight).T).norm() / (x @ weight.T).norm()) for w in (nearest, found))
    assert after < 0.97 * before
    (report,) = simulation.reports
    assert report.after < report.before  # type: ignore[operator]


def test_the_scale_of_a_tensors_scales_is_that_of_the_whole_tensor() -> None:
    weight, x = noise(8, 48), inputs(200, 48)

    found, simulation = simulated(weight, x, "nvfp4", "imatrix")

    (encoded,) = simulation.encoded().values()
    scales = encoded.encoded.scales
    assert isinstance(scales, qsim.Encoded)
    assert float(scales.scales) == pytest.approx(float(weight.abs().max() / 6 / 448), rel=1e-6)  # type: ignore[arg-type]
    assert torch.equal(qsim.parse("nvfp4").decode(encoded.encoded), found)


@pytest.mark.parametrize(
    "weights",
    [
        "channel(int4)",
        "tensor(int4)",
        "block(int4, [4, 8])",
        "channel(int3, symmetric=false)",
        "block(int4, 4, scale=scaled(int8, channel))",
    ],
)
def test_other_granularities_and_zero_points(weights: str) -> None:
    weight, x = noise(8, 16), inputs(200, 16)

    found, simulation = simulated(weight, x, weights, "imatrix")

    (encoded,) = simulation.encoded().values()
    assert torch.equal(qsim.parse(weights).decode(encoded.encoded), found)
    assert not torch.equal(found, qsim.parse(weights)(weight))


@pytest.mark.parametrize(
    ("weights", "text", "message"),
    [
        ("int4", "imatrix(range=minmax)", "minmax does not compare the errors of ranges; mse does"),
        ("tensor(int4)", "local_hessian", "shares scales over rows; hessian=diagonal allows that"),
        ("cast(e4m3)", "imatrix", "has no scales to choose"),
    ],
)
def test_what_it_cannot_do_is_an_error(weights: str, text: str, message: str) -> None:
    with pytest.raises(qsim.RecipeError, match=message):
        simulated(noise(4, 8), inputs(20, 8), weights, text)


class TestIMatrix(TransformSuite):
    text = ("imatrix(range=mse(norm=2, steps=10))", "local_hessian(range=mse(norm=2, steps=10))")
