"""`fused` gives layers that read the same tensor one global scale, so that their weights are those of a fused layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite

NVFP4 = "scaled(e2m1, 16, scale=scaled(e4m3))"
X = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))


class Mixer(nn.Module):
    """q, k and v read one tensor; v's weights are large. o reads another one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
            self.v.weight.data *= 3.3

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.o(self.q(x) * self.k(x) + self.v(x))
        return mixed


def weights_of(model: nn.Module, **recipe: Any) -> dict[str, Tensor]:
    """The weights that the sites multiply."""
    simulation = qsim.simulate(model, {"weights": NVFP4, "transforms": ["fused"], **recipe}, calibration=[X])
    return {name: weight.decode() for name, weight in simulation.encoded().items()}


def test_the_weights_are_those_of_the_fused_layer() -> None:
    model, together = Mixer(), ("q.weight", "k.weight", "v.weight")
    fused = torch.cat([model.get_parameter(name).detach() for name in together])

    found = weights_of(model)

    assert torch.equal(torch.cat([found[name] for name in together]), qsim.parse(NVFP4).quantize(fused))


def test_layers_of_different_modules_are_not_fused() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Mixer(), Mixer()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.one(x) + self.other(x)
            return found

    model = Parallel()
    model.other.q.weight.data *= 100

    assert torch.equal(weights_of(model)["one.q.weight"], weights_of(Mixer())["q.weight"])


def test_a_layer_that_reads_a_tensor_alone_keeps_its_scale() -> None:
    model = Mixer()
    alone = qsim.parse(NVFP4).quantize(model.o.weight.detach())

    simulation = qsim.simulate(model, weights=NVFP4, transforms=["fused"], example=X)

    assert torch.equal(simulation.encoded()["o.weight"].decode(), alone)
    assert [report.note for report in simulation.reports if report.layer == "o.weight"] == [
        "left alone: no other layer of its module reads the same tensor"
    ]


def test_gptq_rounds_to_the_shared_scale() -> None:
    pytest.importorskip("qsim_gptq")
    model = Mixer()

    simulation = qsim.simulate(model, weights=NVFP4, transforms=["fused", "gptq"], calibration=[X])

    texts = {name: str(weight.quantizer) for name, weight in simulation.encoded().items()}
    assert "at_scale" in texts["q.weight"]
    assert texts["q.weight"] == texts["k.weight"] == texts["v.weight"] != texts["o.weight"]
    assert torch.equal(simulation.encoded()["q.weight"].decode(), model.q.weight)


def test_a_quantizer_of_another_plugin_takes_part_by_two_methods() -> None:
    class Coarse(qsim.Quantizer):
        """Rounds to multiples of a quarter of the largest magnitude."""

        name = "coarse"
        highest: float | None = None

        def quantize(self, x: Tensor) -> Tensor:
            step = (self.global_scale(x) if self.highest is None else self.highest) / 4
            return (x / step).round() * step

        def global_scale(self, x: Tensor) -> float:
            return float(x.abs().max())

        def at_global_scale(self, scale: float) -> qsim.Quantizer:
            return self.replace(highest=scale)

    model = Mixer()
    wanted = Coarse(highest=float(model.v.weight.detach().abs().max())).quantize(model.q.weight.detach())

    simulation = qsim.simulate(model, weights=Coarse(), transforms=["fused"], example=X)

    assert torch.equal(simulation.folded_state_dict()[0]["q.weight"], wanted)


@pytest.mark.parametrize(
    ("weights", "transforms", "message"),
    [
        (NVFP4, ["gptq", "fused"], "weight is on its grid already; put fused before the transform that rounded it"),
        ("int4", ["fused"], r"fused changed nothing .*: left alone: channel\(int4\) has no global scale"),
    ],
)
def test_what_it_cannot_do_is_one_line(weights: str, transforms: list[str], message: str) -> None:
    pytest.importorskip("qsim_gptq")

    with pytest.raises(qsim.RecipeError, match=message):
        qsim.simulate(Mixer(), weights=weights, transforms=transforms, calibration=[X])


def test_a_transform_that_changes_weights_comes_before_it() -> None:
    pytest.importorskip("qsim_smoothquant")
    model = nn.Sequential(nn.LayerNorm(32), Mixer())

    with pytest.raises(qsim.RecipeError, match=r"put smoothquant\(0.5\) before that one"):
        qsim.simulate(model, weights=NVFP4, transforms=["fused", "smoothquant"], calibration=[X])


class TestFused(TransformSuite):
    text = "fused"

    def quantizers(self) -> dict[str, qsim.Quantizer]:
        return {"weights": qsim.parse(NVFP4)}
