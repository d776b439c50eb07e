"""The inputs of grouped and depthwise convolutions are rounded: a row is a group of channels at all positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(64, 64, 3, groups=64, bias=False), (2, 64, 50)),
    "conv1d without a batch": (nn.Conv1d(64, 64, 3, groups=64), (64, 50)),
    "conv2d with a multiplier": (nn.Conv2d(16, 32, 3, groups=16, padding=1), (2, 16, 9, 9)),
    "conv3d": (nn.Conv3d(8, 8, 3, groups=8), (1, 8, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16), (2, 16, 9, 9)),
    "two channels in a group": (nn.Conv1d(64, 64, 3, groups=32), (2, 64, 50)),
}


@pytest.mark.parametrize("text", ["int4", "block(int4, 64)", "block(int4, 32, scale=e8m0)", "tensor(int4)"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_format_costs_what_its_bits_say(name: str, text: str) -> None:
    layer, shape = LAYERS[name]
    x = drawn(*shape)
    exact = layer(x)

    with torch.no_grad(), qsim.simulate(layer, activations=text, example=x) as simulation:
        error = float((layer(x) - exact).norm() / exact.norm())
        audit = simulation.audit()

    assert 0.02 < error < 0.2
    assert audit.bits_per_activation is not None and audit.bits_per_activation < 6
    assert not any("rounds nothing" in note for note in audit.notes)


def test_a_token_is_a_channel_at_all_positions_of_a_sample() -> None:
    layer, x = nn.Conv2d(6, 6, 1, groups=6, bias=False), drawn(2, 6, 5, 4)
    nn.init.ones_(layer.weight)

    qsim.simulate(layer, activations="token(int4)", example=x)

    rows = qsim.parse("token(int4)")(x.flatten(2))
    assert torch.equal(layer(x), rows.view_as(x))


def test_an_ordinary_convolution_keeps_a_token_for_each_position() -> None:
    layer, x = nn.Conv1d(6, 6, 1, bias=False), drawn(2, 6, 5)
    nn.init.dirac_(layer.weight)

    qsim.simulate(layer, activations="token(int4)", example=x)

    assert torch.allclose(layer(x), qsim.parse("token(int4)")(x.mT).mT)


def test_the_audit_says_that_such_a_scale_sees_later_tokens() -> None:
    layer, x = nn.Conv1d(6, 6, 3, groups=6), drawn(2, 6, 8)

    notes = [qsim.simulate(layer, activations=text, example=x).audit().notes for text in ("int4",)]

    assert notes == [["weight: input scales are shared over the positions of a group of channels, later ones too"]]


@pytest.mark.parametrize(
    ("recipe", "note"),
    [
        ({"weights": "int4"}, "each element of its weight has a scale of its own: channel(int4) rounds nothing"),
        ({"activations": "block(int8, 1)"}, "each element of its input has a scale of its own: block(int8, n=1) rounds nothing"),
        ({"activations": "mxfp4"}, None),
        ({"activations": "cast(e4m3)"}, None),
        ({"weights": "tensor(int4)"}, None),
    ],
)  # fmt: skip
def test_a_granularity_that_rounds_nothing_is_noted(recipe: dict[str, Any], note: str | None) -> None:
    audit = qsim.simulate(nn.Sequential(nn.Linear(1, 8)), recipe, example=drawn(5, 1)).audit()

    assert [found for found in audit.notes if "rounds nothing" in found] == ([f"0: {note}"] if note else [])
