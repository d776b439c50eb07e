"""The range that a scale covers, and the way from the range to the scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import qsim_core as qsim
from qsim_core.formats.rounding import power_of_two_scale
from qsim_core.quantizers.calibrators import ErrorOf


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def gptq_with_mse(
    x: Tensor, bits: int, sym: bool, norm: float = 2.4, grid: int = 100, maxshrink: float = 0.8
) -> Tensor:
    """GPTQ's reference (quant.py) with `mse=True`: the shrink of each row with the least |error|^2.4."""
    maxq = 2**bits - 1
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(low.abs(), high)
        low = -high

    def rounded(share: float) -> Tensor:
        scale = (share * high - share * low) / maxq
        zero = torch.full_like(scale, (maxq + 1) / 2) if sym else torch.round(-share * low / scale)
        scale, zero = scale[:, None], zero[:, None]
        return scale * ((torch.round(x / scale) + zero).clamp(0, maxq) - zero)

    best, least = rounded(1.0), torch.full_like(high, torch.inf)
    for step in range(int(maxshrink * grid)):
        tried = rounded(1 - step / grid)
        error = (tried - x).abs().pow(norm).sum(1)
        better = error < least
        best[better], least[better] = tried[better], error[better]
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_is_gptqs_search(bits: int) -> None:
    x = noise(24, 96) + 0.1

    asymmetric = qsim.parse(f"channel(int{bits}, symmetric=false, range=mse)")(x)
    symmetric = qsim.parse(f"channel(int({bits}, narrow=false, convention=gptq), range=mse)")(x)

    assert torch.allclose(asymmetric, gptq_with_mse(x, bits, sym=False), rtol=0, atol=1e-6)
    assert torch.allclose(symmetric, gptq_with_mse(x, bits, sym=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("element", ["int3", "e2m1", "nf4", "int4"])
def test_mse_is_never_worse_than_covering_everything(element: str) -> None:
    x = noise(16, 128) ** 3

    def error(text: str) -> Tensor:
        return (qsim.parse(text)(x) - x).abs().pow(2.4).sum(1)

    assert (error(f"channel({element}, range=mse)") <= error(f"channel({element})")).all()
    assert (error(f"channel({element}, range=mse)") < error(f"channel({element})")).any()


@pytest.mark.parametrize("p", [75, 99, 99.9, 100])
def test_percentile_is_numpys(p: float) -> None:
    x = noise(8, 500)
    scale = torch.from_numpy(np.percentile(x.abs().double().numpy(), p, axis=1, keepdims=True)).float() / 7

    assert torch.allclose(
        qsim.parse(f"channel(int4, range=percentile({p}))")(x), (x / scale).round().clamp(-7, 7) * scale, atol=1e-5
    )


@pytest.mark.parametrize(
    "text",
    ["block(int4, 8, range=percentile(75))", "block(nf4, 8, range=mse)", "block(codebook([-1, 1]), 8, range=mse)"],
)
def test_what_fills_up_a_short_last_block_counts_for_nothing(text: str) -> None:
    x, scheme = noise(4, 11), qsim.parse(text)

    assert torch.equal(scheme(x)[:, 8:], scheme(x[:, 8:]))


def test_nor_does_what_fills_up_a_tile() -> None:
    x, scheme = noise(5, 11), qsim.parse("block(int4, [3, 8], range=percentile(75))")

    assert torch.equal(scheme(x)[3:, 8:], scheme(x[3:, 8:]))


def test_nor_in_a_static_scale() -> None:
    x = noise(2000, 11)
    simulation = qsim.simulate(
        torch.nn.Linear(11, 1), activations="block(int4, 8, static=true, range=percentile(99.5))", calibration=[x]
    )

    (site,) = simulation.sites.table.values()

    expected = np.percentile(x[:, 8:].abs().numpy(), 99.5) / 7
    assert float(site.fixed["input"].scale[1]) == pytest.approx(expected, rel=0.01)


def test_a_value_that_stands_for_three_counts_as_three_in_a_percentile() -> None:
    values, counts = torch.tensor([[4.0, 1.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]])

    _, high = qsim.parse("percentile(70)").range(values, lambda low, high: low, counts)

    assert high.item() == np.percentile([1, 1, 1, 3, 3, 4], 70)


def test_a_range_wider_than_float32_has_a_scale() -> None:
    x = torch.tensor([[-3e38, 3e38, 0.0, 1e38]])

    scale, _ = qsim.parse("channel(int4, symmetric=false)").scale_map(x)

    assert torch.equal(scale, torch.full((1, 4), 4e37))


def test_absmax_covers_either_side_alike_even_with_a_zero_point() -> None:
    x = torch.tensor([[-1.0, 3.0, 0.5]])

    assert qsim.parse("channel(uint2, symmetric=false, range=absmax)").encode(x).zero_points.item() == 2  # type: ignore[union-attr]
    assert qsim.parse("channel(uint2, symmetric=false)").encode(x).zero_points.item() == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("range_", ["minmax", "absmax", "percentile", "mse"])
@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_nan_or_inf_shows_it_whatever_the_range(range_: str, symmetric: str, special: float) -> None:
    x = noise(3, 64)
    x[1, 5] = special

    y = qsim.parse(f"channel(int4, range={range_}, symmetric={symmetric})")(x)

    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("rule", "exponents"),
    [("floor", [0, 0, 0, -1, 0]), ("ceil", [0, 1, 1, 0, 1]), ("even", [0, 0, 1, 0, 1]), ("rceil", [0, 0, 1, 0, 1])],
)  # fmt: skip
def test_the_rules_by_hand_for_e2m1(rule: str, exponents: list[int]) -> None:
    """Magnitudes 4, 6, 6.01 (7 rounds up from 7), 3.9, 7.5 against a largest value of 6 = 1.5 * 2^2."""
    magnitudes = torch.tensor([4.0, 6.0, 7.0, 3.9, 7.5])

    scales = power_of_two_scale(magnitudes, rule, 6.0, 8.0)  # type: ignore[arg-type]

    assert scales.log2().tolist() == exponents


def test_a_search_tries_the_scales_that_are_used() -> None:
    """The scale of the tensor is that of the whole range, for each candidate and in the end."""
    x = noise(8, 64)
    unit = x.abs().max() / 6 / 448
    expected = x.clone().view(-1, 16)
    for block in expected:
        tried = []
        for step in range(8):
            scale = qsim.parse("e4m3")(block.abs().max() * (1 - step / 10) / 6 / unit) * unit
            tried.append(qsim.parse("e2m1")(block / scale) * scale)
        block.copy_(min(tried, key=lambda found: float((found - block).square().sum())))

    y = qsim.parse("scaled(e2m1, 16, scale=scaled(e4m3), range=mse(norm=2, steps=10))")(x)

    assert torch.allclose(y, expected.view(8, 64), rtol=1e-6, atol=0)


def test_a_power_of_two_scale_is_exact_next_to_powers_of_two() -> None:
    magnitudes = torch.exp2(torch.arange(-100.0, 100.0))
    below, above = (torch.nextafter(magnitudes, torch.tensor(end)) for end in (0.0, torch.inf))

    for x, floor, ceil in ((magnitudes, 1.0, 1.0), (below, 0.5, 1.0), (above, 1.0, 2.0)):
        assert torch.equal(power_of_two_scale(x, "floor", 1.0, 2.0), magnitudes * floor)
        assert torch.equal(power_of_two_scale(x, "ceil", 1.0, 2.0), magnitudes * ceil)


def test_an_own_calibrator_is_twenty_lines() -> None:
    class Half(qsim.Calibrator):
        """A calibrator that covers half of the range."""

        name = "half"

        def range(self, blocks: Tensor, error: object, counts: object) -> tuple[Tensor, Tensor]:
            return blocks.amin(-1) / 2, blocks.amax(-1) / 2

    host = qsim.Host()
    host.register(Half)

    y = host.parse("channel(int4, range=half)")(torch.tensor([[14.0, 3.0, -7.0]]))

    assert y.tolist() == [[7.0, 3.0, -7.0]]


@pytest.mark.parametrize("options", [{}, {"scale": "bf16"}, {"rule": "ceil"}, {"symmetric": False}], ids=str)
def test_the_error_that_a_calibrator_is_given_is_that_of_the_quantized_values(options: dict[str, object]) -> None:
    asked = []

    class Asking(qsim.Calibrator):
        name = "asking"

        def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
            lowest, highest = blocks.amin(-1) / 2, blocks.amax(-1) / 2
            asked.append(error(lowest, highest))
            return lowest, highest

    host = qsim.Host()
    host.register(Asking, name="asking")
    quantizer = host.parse("block(int4, n=8, range=asking)").replace(**options)
    x = noise(3, 16)

    y = quantizer(x)

    assert torch.equal(asked[0], (y - x).view(asked[0].shape))
