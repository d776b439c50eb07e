"""Kernels of exact arithmetics compute narrow sums too: the bits are those of the accumulator's own `multiply`."""

from __future__ import annotations

import copy

import pytest
import torch
from qsim_accumulators import IntegerAccumulator
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.sites.arithmetic import QuantizedRows

WITH_KERNELS = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"), reason="needs a CPU with AVX2 or NEON"
)
PAIRS = [
    ("channel(int4)", "token(int4)"),
    ("channel(int4)", "token(int8)"),
    ("abfp(int8, n=64)", "abfp(int8, n=32)"),
    ("nvfp4", "nvfp4"),
    ("block(int8, n=48)", "block(int8, n=32)"),
]


class Layer(nn.Module):
    """A linear layer, and a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 128)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y, torch.matmul(y, y.transpose(-1, -2))


def simulated(layer: nn.Module, x: Tensor, weights: str, activations: str, arithmetic: str) -> tuple[Tensor, Tensor]:
    """The outputs of the second forward of a copy."""
    recipe = qsim.Recipe(weights=weights, activations=activations, arithmetic=arithmetic)  # type: ignore[arg-type]
    simulation = qsim.simulate(copy.deepcopy(layer), recipe, example=x)
    with torch.no_grad():
        simulation.model(x)
        outputs: tuple[Tensor, Tensor] = simulation.model(x)
    return outputs


def by_multiply(layer: Layer, x: Tensor, weights: str, activations: str, arithmetic: str) -> tuple[Tensor, Tensor]:
    """The same outputs from quantized rows and the method `multiply` alone."""
    accumulator = qsim.Host().parse(arithmetic, qsim.Arithmetic)
    taken, weight = qsim.parse(activations), QuantizedRows.of(qsim.parse(weights), layer.linear.weight.detach())
    y = accumulator.multiply(QuantizedRows.of(taken, x), weight) + layer.linear.bias.detach()
    rows = QuantizedRows.of(taken, y)
    return y, accumulator.multiply(rows, rows)


def example() -> Tensor:
    return torch.randn(2, 96, 192, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("arithmetic", ["int10", "int16", "int10(overflow=saturate)", "int20(overflow=saturate)"])
@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_the_bits_are_those_of_multiply(weights: str, activations: str, arithmetic: str) -> None:
    torch.manual_seed(0)
    layer, x = Layer(), example()

    outputs = simulated(layer, x, weights, activations, arithmetic)

    expected = by_multiply(layer, x, weights, activations, arithmetic)
    assert all(torch.equal(found, right) for found, right in zip(outputs, expected, strict=True))


@WITH_KERNELS
@pytest.mark.parametrize("arithmetic", ["int10", "int16(overflow=saturate)", "int16(overflow=error)"])
def test_kernels_compute_what_wraps_and_what_stays_in_range(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Layer(), example()
    simulation = qsim.simulate(layer, {"weights": "int4", "activations": "int4", "arithmetic": arithmetic}, example=x)
    slow: list[str] = []
    monkeypatch.setattr(IntegerAccumulator, "multiply", lambda *rows: slow.append("multiply"))

    with torch.no_grad():
        simulation.model(x)

    assert slow == []


def test_a_sum_that_leaves_the_range_is_still_an_error() -> None:
    layer, x = Layer(), example()
    recipe = {"weights": "int8", "activations": "int8", "arithmetic": "int12(overflow=error)"}

    with pytest.raises(qsim.QsimError, match="does not fit 12 bits"):
        qsim.simulate(layer, recipe, example=x).model(x)


def test_an_audit_still_tells_what_the_sums_did() -> None:
    layer, x = Layer(), example()
    simulation = qsim.simulate(layer, {"weights": "int8", "activations": "int8", "arithmetic": "int12"}, example=x)
    with torch.no_grad():
        simulation.model(x)

    first = simulation.audit(x).sites[0]

    assert first.arithmetic == "int12" and first.sums is not None and first.sums.overflowed > 0


@pytest.mark.parametrize("arithmetic", ["int12(overflow=saturate)", "int16(overflow=saturate)"])
def test_an_overwritten_weight_keeps_its_scales_for_what_kernels_decline(arithmetic: str) -> None:
    torch.manual_seed(0)
    layer, x = Layer(), example()
    large = x.clone()
    large[0, 0] = 100 * layer.linear.weight[0].detach().sign()
    recipe = {"weights": "block(int4, n=32, range=percentile(60))", "activations": "int8", "arithmetic": arithmetic}
    kept, overwritten = (qsim.simulate(copy.deepcopy(layer), recipe, keep=keep).model for keep in (True, False))

    with torch.no_grad():
        kept(x), overwritten(x)
        pairs = list(zip(overwritten(large), kept(large), strict=True))

    assert all(torch.equal(found, right) for found, right in pairs)
