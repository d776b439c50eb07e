"""Static scales are found once in calibration data, at every site that needs them, in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.quantizers.observers import BINS, Extremes, Histogram

Make = Callable[..., Any]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scales", [[1.0, 1.0], [1.0, 1000.0], [1000.0, 1.0], [1e-20, 1.0], [0.0, 1.0]])
def test_two_halves_are_the_whole(scales: list[float]) -> None:
    parts = [noise(3, 500, seed=i) * scale for i, scale in enumerate(scales)]
    whole, halves = Histogram(), Histogram()

    whole.update(torch.cat(parts, -1))
    for part in parts:
        halves.update(part)

    assert all(torch.equal(a, b) for a, b in zip(halves.values(), whole.values(), strict=True))


def test_the_order_of_batches_does_not_matter() -> None:
    parts = [noise(1, 100, seed=i) * 10.0**i for i in range(5)]
    forward, backward = Histogram(), Histogram()
    for part in parts:
        forward.update(part)
    for part in reversed(parts):
        backward.update(part)

    assert torch.equal(forward.counts, backward.counts)


def test_bins_hold_what_they_say() -> None:
    histogram = Histogram()
    x = noise(1, 10_000) * 3
    histogram.update(x)
    width = 2.0 ** float(histogram.exponent)  # type: ignore[arg-type]

    edges = (np.arange(BINS + 1) - BINS // 2) * width
    expected, _ = np.histogram(x.numpy(), edges)

    assert torch.equal(histogram.counts[0], torch.from_numpy(expected).double())
    assert x.abs().max() < width * BINS // 2 <= 2 * x.abs().max() + width


def test_extremes_are_exact() -> None:
    for observer in (Extremes(), Histogram()):
        observer.update(torch.tensor([[0.3, -0.7]]))
        observer.update(torch.tensor([[0.1, 0.9]]))
        values, _ = observer.values()
        assert (values.min().item(), values.max().item()) == (torch.tensor(-0.7).item(), torch.tensor(0.9).item())


def test_a_static_scale_is_that_of_all_the_data() -> None:
    model, batches = nn.Linear(8, 4, bias=False), [noise(16, 8, seed=i) * (i + 1) for i in range(3)]
    qsim.simulate(model, activations="tensor(int8, static=true)", calibration=batches)
    scale = torch.cat(batches).abs().max() / 127
    x = noise(5, 8, seed=9) * 10

    with torch.no_grad():
        y = model(x)

    assert torch.equal(y, ((x / scale).round().clamp(-127, 127) * scale) @ model.weight.T)


def test_static_scales_along_the_row_are_shared_over_all_rows() -> None:
    model, batches = nn.Linear(10, 4, bias=False), [noise(6, 10, seed=i) for i in range(2)]
    simulation = qsim.simulate(model, activations="block(int8, 4, static=true)", calibration=batches)
    x = torch.cat(batches)
    expected = torch.stack([x[:, :4].abs().max(), x[:, 4:8].abs().max(), x[:, 8:].abs().max()]) / 127

    (site,) = simulation.sites.table.values()

    assert torch.equal(site.fixed["input"].scale.squeeze(-1), expected)


@pytest.mark.parametrize("range_", ["percentile(99)", "mse"])
def test_a_histogram_chooses_nearly_what_the_values_themselves_choose(range_: str) -> None:
    data = noise(1, 50_000) ** 3
    dynamic = qsim.parse(f"tensor(int4, range={range_})")
    simulation = qsim.simulate(
        nn.Linear(50_000, 1), activations=f"tensor(int4, static=true, range={range_})", calibration=[data]
    )

    (site,) = simulation.sites.table.values()

    assert float(site.fixed["input"].scale) == pytest.approx(float(dynamic.scale_map(data)[0].max()), rel=0.03)


def test_q_k_p_and_v_have_scales_of_their_own_in_one_pass(make: Make, ids: Tensor) -> None:
    model, runs = make("opt"), []
    model.register_forward_hook(lambda *args: runs.append(1))
    simulation = qsim.simulate(
        model,
        weights="int8",
        activations="tensor(int8, static=true, symmetric=false)",
        calibration=[{"input_ids": ids}] * 3,
    )

    fixed = {site.name: site.fixed for site in simulation.sites.table.values()}

    attention = fixed["model.decoder.layers.0.self_attn:matmul.0"]
    assert set(attention) == {"input", "input2"}
    assert attention["input"].scale.item() != attention["input2"].scale.item()
    assert set(fixed["model.decoder.layers.0.fc1"]) == {"input"}
    assert len(runs) == 1 + 3  # one to find the sites
    exact = make("opt")(input_ids=ids).logits
    assert (model(input_ids=ids).logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_zero_point_is_static_too() -> None:
    model, batches = nn.Linear(4, 4, bias=False), [torch.tensor([[1.0, 2.0, 3.0, 16.0]])]
    simulation = qsim.simulate(model, activations="tensor(uint4, static=true, symmetric=false)", calibration=batches)

    (site,) = simulation.sites.table.values()

    assert (site.fixed["input"].scale.item(), site.fixed["input"].zero.item()) == (pytest.approx(16 / 15), 0.0)


def test_outputs_may_be_static() -> None:
    model = nn.Linear(4, 4, bias=False)
    simulation = qsim.simulate(model, outputs="tensor(int8, static=true)", calibration=[torch.ones(1, 4)])

    (site,) = simulation.sites.table.values()

    assert site.fixed["output"].scale.item() == pytest.approx(float(model.weight.detach().sum(1).abs().max()) / 127)


def test_a_copied_model_keeps_its_scales() -> None:
    model = nn.Linear(4, 4)
    qsim.simulate(model, activations="tensor(int4, static=true)", calibration=[noise(3, 4)])
    x = noise(2, 4, seed=5)

    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_the_gradient_stops_outside_the_range() -> None:
    model = nn.Linear(2, 1, bias=False)
    qsim.simulate(model, activations="tensor(int4, static=true)", calibration=[torch.tensor([[7.0, -7.0]])])
    x = torch.tensor([[3.0, 9.0]], requires_grad=True)

    model(x).backward()

    assert x.grad[0, 1] == 0  # type: ignore[index]
    assert x.grad[0, 0] == model.weight[0, 0]  # type: ignore[index]


def test_a_static_scale_sees_no_other_sample_and_the_audit_says_so() -> None:
    model = nn.Linear(4, 4)
    simulation = qsim.simulate(model, activations="tensor(int8, static=true)", calibration=[noise(3, 4)])

    (site,) = simulation.audit().sites

    assert site.notes == []
    assert site.input == "tensor(int8, static=true)"


def test_without_calibration_data_it_says_what_is_missing() -> None:
    model = nn.Linear(4, 4)
    qsim.simulate(model, activations="tensor(int8, static=true)", example=noise(1, 4))

    with pytest.raises(
        qsim.RecipeError, match=r"has no scale, as no calibration data reached it; give simulate\(…, calibration=b"
    ):
        model(noise(1, 4))


@pytest.mark.parametrize(
    "scheme", ["token(int8, static=true)", "channel(int8, static=true)", "block(int8, [2, 4], static=true)"]
)
def test_rows_have_no_static_scale(scheme: str) -> None:
    with pytest.raises(qsim.SpecError, match="a static scale is for the tensor or for n along the row, not for "):
        qsim.parse(scheme)


@pytest.mark.parametrize(
    ("data", "quantizer", "message"),
    [
        (
            torch.zeros(2, 4),
            "tensor(int8, static=true)",
            r"^weight_site \(input\) saw only zeros in the calibration data$",
        ),
        (torch.tensor([[1e-8, 1e3, 1.0, 1.0]]), "block(int8, 1, static=true)", r"has scales from 7.9e-11 to 7.9$"),
        (noise(40, 4), "tensor(int8, static=true, range=percentile(90))", r"clips \d+\.\d% of its values$"),
    ],
)
def test_a_calibration_that_collapsed_is_pointed_out(data: Tensor, quantizer: str, message: str) -> None:
    model = nn.Sequential()
    model.add_module("weight_site", nn.Linear(4, 4))

    with pytest.warns(qsim.CalibrationWarning, match=message):
        qsim.simulate(model, activations=quantizer, calibration=[data])


class _Values(nn.Module):
    """P·v alone: the rows of both operands are tokens."""

    def forward(self, p: Tensor, v: Tensor) -> Tensor:
        return p @ v


@pytest.mark.parametrize("lengths", [(4, 8), (8, 4)])
def test_blocks_along_tokens_have_no_static_scales_for_other_lengths(lengths: tuple[int, int]) -> None:
    first, other = (noise(2, length, length) for length in lengths)
    model = _Values()
    qsim.simulate(model, activations="block(int8, 4, static=true)", calibration=[(first, first)])

    with pytest.raises(qsim.DataError) as error:
        model(other, other)

    assert str(error.value) == (
        f":matmul.0 (input): block(int8, n=4, static=true) has static scales for {lengths[0] // 4} blocks along a row, "
        f"and here are {lengths[1] // 4}; where lengths differ, blocks along tokens cannot have static scales"
    )


def test_calibration_data_of_two_lengths_gives_blocks_along_tokens_no_static_scales() -> None:
    batches = [(noise(2, length, length),) * 2 for length in (4, 8)]

    with pytest.raises(qsim.DataError, match="has static scales for 1 blocks along a row, and here are 2; where le"):
        qsim.simulate(_Values(), activations="block(int8, 4, static=true)", calibration=batches)


NVFP4 = "scaled(e2m1, block=16, scale=scaled(e4m3, static=true))"


def scaled_input(factor: float) -> torch.Tensor:
    return factor * torch.randn(6, 64, generator=torch.Generator().manual_seed(3))


def test_the_scale_of_block_scales_is_found_once_and_the_block_scales_in_each_tensor() -> None:
    model = torch.nn.Linear(64, 8)
    with qsim.simulate(model, activations=NVFP4, calibration=[scaled_input(1.0)]):
        found = model(scaled_input(0.25))

    whole = scaled_input(1.0).abs().max() / 6 / 448
    with qsim.simulate(model, activations=f"scaled(e2m1, block=16, scale=at_scale(e4m3, {float(whole)!r}))"):
        assert torch.equal(found, model(scaled_input(0.25)))


@pytest.mark.parametrize("more", ["", ", range=mse(steps=10)", ", range=four_over_six"])
def test_on_the_calibration_data_it_is_the_dynamic_scheme(more: str) -> None:
    model, x = torch.nn.Linear(64, 8), scaled_input(1.0)
    with qsim.simulate(model, activations=f"{NVFP4[:-1]}{more})", calibration=[x]):
        found = model(x)

    with qsim.simulate(model, activations=f"scaled(e2m1, block=16, scale=scaled(e4m3){more})"):
        assert torch.equal(found, model(x))


def test_the_scale_of_block_scales_is_saved_and_loaded() -> None:
    model, x = torch.nn.Linear(64, 8), scaled_input(0.25)
    with qsim.simulate(model, activations=NVFP4, calibration=[scaled_input(1.0)]) as simulation:
        wanted, state = model(x), simulation.state_dict()

    with qsim.simulate(model, activations=NVFP4, example=x, state=state):
        assert torch.equal(model(x), wanted)


def test_without_calibration_data_it_is_an_error() -> None:
    model = torch.nn.Linear(64, 8)
    with qsim.simulate(model, activations=NVFP4), pytest.raises(qsim.RecipeError, match="has no scale"):
        model(scaled_input(1.0))
