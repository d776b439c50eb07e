"""A checkpoint that others have quantized is written again with the codes and the scales that it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, build
from qsim_interop.reading import open_checkpoint
from qsim_interop.reading.packed_weight import PackedWeight
from qsim_interop.writing import export
from torch import Tensor, nn

import qsim_core as qsim

EXAMPLE = FAMILIES["Llama"].example
RANDOM = torch.Generator().manual_seed(0)


def scheme(text: str) -> Any:
    return qsim.parse(text)


def nvfp4(whole: float = 1234.567, **options: Any) -> PackedWeight:
    """A weight [32, 32] of NVFP4 under a global scale."""
    codes = torch.randint(0, 16, (32, 32), generator=RANDOM, dtype=torch.uint8)
    scales = (torch.rand(32, 2, generator=RANDOM) * 400 + 1).to(torch.float8_e4m3fn)
    return PackedWeight(scheme("nvfp4"), codes, scales, None, torch.tensor([whole]), **options)


def tiles() -> PackedWeight:
    codes = torch.randn(32, 32, generator=RANDOM).to(torch.float8_e4m3fn).view(torch.uint8)
    return PackedWeight(scheme("block(e4m3, [16, 16])"), codes, torch.rand(2, 2, generator=RANDOM) + 0.1)


def act_order() -> PackedWeight:
    """Groups of 16 columns that do not lie side by side, with zero points."""
    codes = torch.randint(0, 16, (32, 32), generator=RANDOM, dtype=torch.uint8)
    zeros = torch.randint(-8, 8, (32, 2), generator=RANDOM, dtype=torch.int16)
    groups = (torch.arange(32) // 16)[torch.randperm(32, generator=RANDOM)]
    scales = torch.rand(32, 2, generator=RANDOM).half()
    return PackedWeight(scheme("block(int4, 16, symmetric=false, scale=fp16)"), codes, scales, zeros, groups=groups)


WEIGHTS: dict[str, Callable[[], PackedWeight]] = {
    "modelopt": nvfp4,
    "compressed-tensors": lambda: nvfp4(applied="divide"),
    "tiles": tiles,
    "act-order": act_order,
}


def layer(packed: PackedWeight) -> qsim.Simulation:
    """A simulated layer with a weight that is stored so."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    model[0].weight.data.copy_(packed.dequantize())
    final = {"0.weight": packed.stored("0.weight")}
    return qsim.simulate(model, weights=packed.quantizer, final=final, example=torch.randn(2, 32))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_stored_weight_is_encoded_with_its_own_codes(name: str) -> None:
    packed = WEIGHTS[name]()

    encoded = layer(packed).encoded()["0.weight"]

    assert encoded.layout is not None
    assert torch.equal(encoded.layout.back(encoded.encoded.codes), packed.codes)
    assert torch.equal(encoded.decode(), packed.dequantize())


def written_again(packed: PackedWeight, to: str, folder: Path) -> Tensor:
    """A weight of a Llama after it was exported, and read."""
    model: Any = build("Llama")
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).weight = nn.Parameter(packed.dequantize())
    stored = {f"{name}.weight": packed.stored(f"{name}.weight")}
    simulation = qsim.simulate(model, overrides={name: {"weights": packed.quantizer}}, final=stored, example=EXAMPLE)
    export(simulation, qsim.LoadedModel(model), to, folder / "out")
    checkpoint = open_checkpoint(folder / "out")
    return checkpoint.dequantize(checkpoint.layers[0])


@pytest.mark.parametrize(
    ("packed", "to"),
    [
        (nvfp4(applied="divide"), "compressed-tensors"),
        (nvfp4(2.0**-9), "compressed-tensors"),
        (tiles(), "compressed-tensors"),
        (nvfp4(), "torchao"),
    ],
)
def test_the_file_has_the_bits_of_the_one_that_was_read(packed: PackedWeight, to: str, tmp_path: Path) -> None:
    pytest.importorskip(to.replace("-", "_"))

    assert torch.equal(written_again(packed, to, tmp_path), packed.dequantize())


@pytest.mark.parametrize(
    ("packed", "to", "message"),
    [
        (
            act_order(),
            "compressed-tensors",
            r"q_proj.weight: the columns of a group do not lie side by side \(act-order",
        ),
        (nvfp4(0.0123), "compressed-tensors", "it divides by a global scale, and no float32 divisor gives these bits"),
        (nvfp4(applied="divide"), "torchao", "torchao does not hold vllm_nvfp4 exactly"),
    ],
)
def test_what_a_format_does_not_hold_is_refused_with_the_reason(
    packed: PackedWeight, to: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(qsim.RecipeError, match=message):
        written_again(packed, to, tmp_path)


def test_inputs_in_nvfp4_keep_their_global_scale(tmp_path: Path) -> None:
    model: Any = build("Llama")
    inputs = "scaled(e2m1, 16, scale=at_scale(e4m3, 0.02))"
    off = dict.fromkeys(("queries", "keys", "probabilities", "values"))
    recipe = {"weights": "vllm_nvfp4", "activations": inputs, "skip": ["lm_head"], **off}
    export(
        qsim.simulate(model, recipe, example=EXAMPLE), qsim.LoadedModel(model), "compressed-tensors", tmp_path / "out"
    )

    checkpoint = open_checkpoint(tmp_path / "out")

    assert {str(layer.activations) for layer in checkpoint.layers} == {
        "scaled(e2m1, block=16, scale=scaled(e4m3, static=true))"
    }
    assert {float(scale) for scale in checkpoint.input_scales().values()} == {float(torch.tensor(0.02))}
