"""Random small models: tracing them, and every transform on them, ends in no error of torch and keeps the function."""

from __future__ import annotations

import pytest
import torch
from qsim_structure import permute_rows, permute_scores, scale_group, scale_pair
from qsim_structure.for_transforms import permute_group, trace_example
from random_models import Model, random_model, tensors_of
from torch import Tensor

import qsim_core as qsim

TRANSFORMS = ["smoothquant", "rptq", "hadamard", "awq", "gptq", "bias_correction", "wush", "gptaq", "signround(2)"]
FEW, MANY = range(100, 112), range(200, 500)


def outputs(model: Model, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(**batch))


def change(exact: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference of two lists of outputs, relative to the largest value of each."""
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(exact, found, strict=True))


def fold_and_reorder(model: Model, batch: dict[str, Tensor], seed: int) -> None:
    """Fold random factors and random orders into everything that a trace finds."""
    found = trace_example(model, batch)
    generator = torch.Generator().manual_seed(seed)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    for group in found.groups:
        scale_group(model, group, torch.rand(group.size, generator=generator) + 0.5)
        if not found.why_ordered(group.norm):
            permute_group(model, group, order(group.size))
    values = {attention.value.producer for attention in found.attention}
    for pair in found.pairs:
        if pair.scales:
            scale_pair(model, pair, torch.rand(pair.size, generator=generator) + 0.5)
        if pair.producer not in values and not found.why_ordered(pair.producer):
            permute_rows(model, pair, order(pair.size))
    for attention in found.attention:
        if not found.why_ordered(f"{attention.path}:pv"):
            channels = torch.arange(attention.value.size)
            for head in attention.value.distinct:
                channels[head] = head[order(len(head))]
            permute_rows(model, attention.value, channels)
        if attention.key is not None and not found.why_ordered(f"{attention.path}:qk"):
            size = attention.key.heads.shape[-1]
            permute_scores(model, attention, [order(size) for _ in attention.key.distinct])


def is_traced_and_folded(seed: int) -> bool:
    model, batches = random_model(seed)
    model, batch = model.double(), {name: tensor.double() for name, tensor in batches[0].items()}
    exact, buffers = outputs(model, batch), [buffer.clone() for buffer in model.buffers()]

    fold_and_reorder(model, batch, seed)

    unchanged = all(map(torch.equal, buffers, model.buffers()))
    return unchanged and change(exact, outputs(model, batch)) <= 1e-5


def is_kept_by(transform: str, seed: int) -> bool:
    """Tell if a model stays what it was under a transform and fine formats, and is the same again afterwards."""
    model, batches = random_model(seed)
    exact = outputs(model, batches[0])
    try:
        with qsim.simulate(
            model, weights="channel(int16)", activations="token(int16)", transforms=[transform], calibration=batches
        ):
            simulated = outputs(model, batches[0])
    except qsim.RecipeError as error:
        simulated = exact
        assert "changed nothing in this model" in str(error)
    return change(exact, simulated) <= 0.02 and change(exact, outputs(model, batches[0])) == 0


@pytest.mark.parametrize("seed", FEW)
def test_a_random_model_is_traced_and_what_is_found_can_be_folded(seed: int) -> None:
    assert is_traced_and_folded(seed)


@pytest.mark.filterwarnings("ignore::qsim_core.CalibrationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_random_model_stays_what_it_was_under_a_transform(transform: str) -> None:
    assert [seed for seed in FEW[:3] if not is_kept_by(transform, seed)] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qsim_core.CalibrationWarning")
def test_many_random_models() -> None:
    changed = [("trace", seed) for seed in MANY if not is_traced_and_folded(seed)]
    changed += [(transform, seed) for seed in MANY for transform in TRANSFORMS if not is_kept_by(transform, seed)]
    assert changed == []
