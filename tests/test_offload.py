"""Models whose weights accelerate keeps elsewhere: transforms change them where they are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.snapshots import digest
from qsim_core.transforms.context import Context
from qsim_core.transforms.offload import at_hand, state

Make = Callable[..., Any]


def offload(model: Any, how: str, directory: Path) -> Any:
    from accelerate import cpu_offload, disk_offload

    device = torch.device("cpu")
    if how == "memory":
        return cpu_offload(
            model, execution_device=device, state_dict={n: t.clone() for n, t in model.state_dict().items()}
        )
    return disk_offload(model, str(directory), execution_device=device)


class Halve(qsim.Transform):
    """Halves every quantized weight, block by block, after looking at the block's products."""

    name = "halve"

    def apply(self, model: nn.Module, context: Context) -> None:
        for block in context.blocks():
            seen: list[str] = []
            block.observe(lambda site, call: seen.append(site.name))  # noqa: B023 - used up in this iteration
            for weight in context.weights():
                if weight.site.name in seen:
                    weight.parameter.mul_(0.5)
            context.report(block.path)


@pytest.mark.parametrize("how", ["memory", "disk"])
def test_a_walk_changes_weights_where_they_are_kept(how: str, make: Make, ids: Tensor, tmp_path: Path) -> None:
    batches = [{"input_ids": ids, "use_cache": False}]
    here, elsewhere = make("llama"), offload(make("llama"), how, tmp_path)

    for model in (here, elsewhere):
        qsim.simulate(model, weights="int8", transforms=[Halve()], calibration=batches)

    with torch.no_grad():
        assert torch.equal(elsewhere(**batches[0]).logits, here(**batches[0]).logits)
    assert all(parameter.is_meta for parameter in elsewhere.parameters())
    assert all(torch.equal(dict(state(elsewhere))[name], p) for name, p in here.named_parameters())


PLAIN = ["gptq", "smoothquant", "hadamard", "awq", "rptq"]
ALIKE = ["hadamard(size=8)", "wush(8)", "gptaq", "adaround(2)", "imatrix", "spinquant(1, size=8)"]
"""Transforms that reach weights in the ways of those above: in pairs, block by block, or one by one."""


@pytest.mark.parametrize("transform", [*PLAIN, *(pytest.param(text, marks=pytest.mark.slow) for text in ALIKE)])
def test_methods_change_weights_where_they_are_kept(transform: str, make: Make, ids: Tensor, tmp_path: Path) -> None:
    batches = [{"input_ids": (ids + shift) % 96, "use_cache": False} for shift in range(6)]
    here, elsewhere = make("llama"), offload(make("llama"), "disk", tmp_path)

    for model in (here, elsewhere):
        qsim.simulate(model, weights="int4", activations="int8", transforms=[transform], calibration=batches)

    with torch.no_grad():
        assert torch.equal(elsewhere(**batches[0]).logits, here(**batches[0]).logits)


@pytest.mark.parametrize("how", ["memory", "disk"])
def test_restore_gives_them_back(how: str, make: Make, ids: Tensor, tmp_path: Path) -> None:
    model = offload(make("opt"), how, tmp_path)
    before = {name: tensor.clone() for name, tensor in state(model)}
    simulation = qsim.simulate(
        model, weights="int8", transforms=[Halve()], calibration=[{"input_ids": ids, "use_cache": False}]
    )
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state(model))

    simulation.restore()

    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model))


def test_only_what_was_changed_is_held_in_memory(make: Make, tmp_path: Path) -> None:
    model = offload(make("opt"), "disk", tmp_path)
    fc1, fc2 = model.model.decoder.layers[0].fc1, model.model.decoder.layers[0].fc2

    with torch.no_grad(), at_hand(fc1, fc2):
        fc1.weight.mul_(2)

    loader = fc1._hf_hook.weights_map.dataset
    assert list(loader.state_dict) == ["model.decoder.layers.0.fc1.weight"]


def test_a_digest_reads_weights_in_their_files(make: Make, tmp_path: Path) -> None:
    here, elsewhere = make("opt"), offload(make("opt"), "disk", tmp_path)
    before = digest(state(elsewhere))
    file = tmp_path / "model.decoder.layers.0.fc1.weight.dat"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1

    file.write_bytes(damaged)

    assert before == digest(state(here)) != digest(state(elsewhere))
