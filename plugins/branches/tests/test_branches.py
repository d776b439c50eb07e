"""SVDQuant and ARCQuant against their formulas, written out, and against values found by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qsim_branches.arcquant import Augmented
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite
from qsim_core.testing import both_ways as both_ways


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def simulated(model: nn.Module, x: Tensor, text: str, weights: str, activations: str | None, **more: Any) -> Any:
    recipe = {"weights": weights, "activations": activations, "transforms": [text], **more}
    return qsim.simulate(model, {k: v for k, v in recipe.items() if v is not None}, calibration=[x])


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors of the nearest matrix of a rank, in bfloat16: power iterations, one singular value at a time."""
    rest, columns, rows = weight.double(), [], []
    for _ in range(rank):
        v = torch.ones(weight.shape[1], dtype=torch.float64)
        for _ in range(5000):
            v = rest.T @ (rest @ v)
            v = v / v.norm()
        columns.append(rest @ v)
        rows.append(v)
        rest = rest - torch.outer(columns[-1], v)
    return bf16(torch.stack(columns, 1).float()), bf16(torch.stack(rows).float())


def int_rows(x: Tensor, largest: int) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / largest
    return (x / scale).round() * scale


@pytest.mark.usefixtures("both_ways")
def test_svdquant_is_the_formula_written_out() -> None:
    weight, x = noise(12, 8), noise(40, 8, seed=1)
    model = layer(weight)

    simulated(model, x, "svdquant(2, grid=0, iterations=1)", "channel(int4)", "token(int8)")

    up, down = svd(weight, 2)
    expected = int_rows(x, 127) @ int_rows(weight - up @ down, 7).T + bf16(bf16(x) @ down.T) @ up.T
    assert torch.allclose(model(x), expected, rtol=1e-3, atol=2e-2)
    assert (model(x) - expected).norm() < 2e-3 * expected.norm()


def test_svdquant_by_hand() -> None:
    """Under one scale 16 leaves no room for 1. The factors take it out, and the rest is exact."""
    weight, x = torch.diag(torch.tensor([16.0, 1.0, 1.0])), torch.tensor([[1.0, 2.0, 3.0]] * 3)
    alone, split = layer(weight), layer(weight)

    qsim.simulate(alone, weights="tensor(int4)", example=x)
    simulated(split, x, "svdquant(1, grid=0)", "tensor(int4)", None)

    assert alone(x)[0].tolist() == [16.0, 0.0, 0.0]
    assert split(x)[0].tolist() == [16.0, 2.0, 3.0]


def test_smoothing_takes_the_exponents_with_the_least_error() -> None:
    weight, x = noise(12, 8), noise(40, 8, seed=1) * torch.tensor([1.0, 20.0, 1, 1, 1, 1, 0.1, 1])
    model, exact = layer(weight), x @ weight.T

    def smoothing(a: float, b: float) -> Tensor:
        return x.abs().amax(0) ** a / weight.abs().amax(0) ** b

    def error(a: float, b: float) -> float:
        s = smoothing(a, b)
        up, down = svd(weight * s, 2)
        found = int_rows(x / s, 7) @ int_rows(weight * s - up @ down, 7).T + bf16(bf16(x / s) @ down.T) @ up.T
        return float((found - exact).norm() / exact.norm())

    simulation = simulated(model, x, "svdquant(2, grid=4, iterations=1)", "channel(int4)", "token(int4)")

    pairs = [(0.0, 0.0), *((a, b) for a in (0.25, 0.5, 0.75) for b in (0.0, 1 - a))]
    best = min(pairs, key=lambda pair: error(*pair))
    report = simulation.reports[0]
    assert torch.allclose(simulation.sites.table["weight"].rotations["input"](x), x / smoothing(*best))
    assert report.note.startswith(f"rank 2; s = max|x|^{best[0]:g} / max|w|^{best[1]:g}")
    assert report.after == pytest.approx(error(*best), rel=0.02)
    assert report.after < report.before


def test_more_iterations_are_no_worse() -> None:
    weight, x = noise(24, 16), noise(80, 16, seed=1)

    first, last = (
        simulated(layer(weight), x, f"svdquant(4, iterations={count})", "channel(int3)", None).reports[0]
        for count in (1, 20)
    )

    assert last.after < first.after


def test_factors_are_counted_in_bits_and_in_the_work() -> None:
    model, x = layer(noise(12, 8)), noise(40, 8, seed=1)

    simulation = simulated(model, x, "svdquant(2, grid=0)", "channel(int4)", "token(int8)")

    own = qsim.parse("channel(int4)").bits_per_element(torch.Size([12, 8]))
    assert simulation.audit().bits_per_weight == pytest.approx(own + 16 * 2 * (12 + 8) / (12 * 8))
    main, down, up = simulation.work()
    assert [(one.product.n, one.product.k) for one in (main, down, up)] == [(12, 8), (2, 8), (12, 2)]
    assert [operand.bits for one in (down, up) for operand in one.operands] == [16.0] * 4


def test_the_result_is_rounded_after_the_sum() -> None:
    model, x = layer(noise(12, 8)), noise(40, 8, seed=1)
    exact = layer(noise(12, 8))
    simulated(exact, x, "svdquant(2, grid=0)", "channel(int4)", "token(int8)")

    simulated(model, x, "svdquant(2, grid=0)", "channel(int4)", "token(int8)", outputs="bf16")

    assert torch.equal(model(x), bf16(exact(x)))


@pytest.mark.parametrize(
    ("text", "activations", "reason"),
    [
        ("svdquant(8)", "block(int4, 4)", "a rank of 8 is not below its 8 rows or columns"),
        ("arcquant", "token(int4)", "has no blocks along the rows: under the scale of its row an error is rounded to"),
        ("arcquant", "block(int4, 3)", "blocks of 3 do not divide its 8 inputs"),
        ("arcquant", "tensor(int4, static=true)", "has static scales, which are found after all transforms"),
        ("arcquant", None, "its input is not quantized"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(text: str, activations: str | None, reason: str) -> None:
    model, x = layer(noise(12, 8)), noise(40, 8, seed=1)

    with pytest.raises(qsim.RecipeError, match=rf"changed nothing in this model: left alone: .*{reason}"):
        simulated(model, x, text, "channel(int4)", activations)


def test_convolutions_are_left_alone_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(8, 12))
    with torch.no_grad():
        model[1].weight.copy_(noise(12, 8))

    reports = simulated(model, noise(1, 8, 8), "svdquant(2)", "channel(int4)", "token(int8)").reports

    assert [(report.layer, report.note[:25]) for report in reports if report.after is None] == [
        ("0.weight", "left alone: a conv1d")
    ]


def test_few_tokens_are_said() -> None:
    with pytest.warns(qsim.CalibrationWarning, match=r"^weight saw 3 tokens, fewer than its 8 columns: give more"):
        simulated(layer(noise(12, 8)), noise(3, 8), "svdquant(2)", "channel(int4)", None)


def blocks(x: Tensor, size: int, largest: int = 7) -> Tensor:
    return int_rows(x.unflatten(-1, (-1, size)), largest).flatten(-2)


@pytest.mark.usefixtures("both_ways")
def test_arcquant_is_the_longer_product_written_out() -> None:
    weight, x = noise(12, 16), noise(40, 16, seed=1) * torch.linspace(3, 0.1, 16)
    model = layer(weight)

    simulated(model, x, "arcquant(channels=8)", "block(int4, 4)", "block(int4, 4)")

    order = sorted(range(16), key=lambda column: float(x[:, column].abs().max()))
    of_x, of_weight = blocks(x[:, order], 4), blocks(weight[:, order], 4)
    error = blocks((x[:, order] - of_x)[:, -8:], 4)
    longer = torch.cat([of_x, error], 1) @ torch.cat([of_weight, of_weight[:, -8:]], 1).T
    assert torch.allclose(model(x), longer, atol=1e-5)


def test_residual_channels_by_hand() -> None:
    """7 leaves 2.4 a step of 1. The error 0.4 has a block of its own, and with it a step of 0.4/7."""
    quantizer = Augmented(qsim.parse("block(int4, 2)"), channels=2)

    found = quantizer.quantize(torch.tensor([[1.0, 7.0, 7.0, 2.4]]))

    assert found.tolist() == [[1.0, 7.0, 7.0, pytest.approx(2.4)]]


def test_residuals_share_the_scale_of_scales() -> None:
    """In one product all blocks have the same global scale, that of the larger inputs."""
    quantizer, x = qsim.parse("scaled(e2m1, 4, scale=scaled(e4m3, tensor))"), noise(6, 8)

    found = Augmented(quantizer, channels=4).quantize(x)

    error = (x - quantizer.quantize(x))[:, 4:]
    both = quantizer.quantize(torch.cat([x, error], 1))
    assert torch.equal(found[:, :4], both[:, :4])
    assert torch.equal(found[:, 4:], both[:, 4:8] + both[:, 8:])


def test_the_threshold_says_how_many_channels_are_multiplied_twice() -> None:
    """One value in eight is beyond an eighth of the largest of its token: one channel, rounded up to a block."""
    x = torch.full((40, 8), 0.1)
    x[:, 3] = 1.0

    report = simulated(layer(noise(12, 8)), x, "arcquant", "block(int4, 4)", "block(int4, 4)").reports[0]

    assert report.note == "4 of 8 channels twice"


def test_residual_channels_are_counted_in_bits_and_in_the_work() -> None:
    simulation = simulated(
        layer(noise(12, 8)), noise(40, 8), "arcquant(channels=4)", "block(int4, 4)", "block(int4, 4)"
    )

    bits, audit, (work,) = 4 + 32 / 4, simulation.audit(), simulation.work()
    assert (audit.bits_per_weight, audit.bits_per_activation) == (bits * 12 / 8, bits * 12 / 8)
    assert (work.product.n, work.product.k) == (12, 12)
    assert [operand.bytes for operand in work.operands] == [40 * 12 * bits / 8, 12 * 12 * bits / 8]


class TestSVDQuant(TransformSuite):
    text = ("svdquant(2, grid=3, iterations=2)", "svdquant(1, dtype=fp16, grid=0)")


class TestARCQuant(TransformSuite):
    text = ("arcquant", "arcquant(channels=8)")

    def quantizers(self) -> dict[str, Any]:
        return {"weights": qsim.parse("block(int4, 8)"), "activations": qsim.parse("block(int8, 8)")}
