"""A simulated model trains in a plain loop, accelerate, DistributedDataParallel and transformers' `Trainer`."""

from __future__ import annotations

import copy
import inspect
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import two_processes
from accelerate import Accelerator
from families import make, tokens
from qsim_finetune.divergence import Watch
from qsim_finetune.output_directory import last_checkpoint
from qsim_finetune.saving import SavingTrainer
from qsim_finetune.trained import read_state
from qsim_finetune.trainer import SimulationCallback
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import qsim_core as qsim

LEARNED = {"weights": "channel(int4, gradient=lsq)", "activations": "abfp(int8, n=8, gradient=lsq)"}


def opt(**parts: Any) -> qsim.Simulation:
    return qsim.simulate(make("opt").train(), **(parts or LEARNED), example={"input_ids": tokens(), "use_cache": False})


def windows(many: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 96, (many, 16), generator=generator)]


def trainer(simulation: qsim.Simulation, directory: Path, kind: Any = Trainer, **changes: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "logging_nan_inf_filter": False,
            **changes,
        },
    )
    callback = SimulationCallback(simulation)
    return kind(simulation.model, arguments, train_dataset=windows(20), callbacks=[callback])  # type: ignore[no-any-return]


def curve(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_two_halves_of_a_batch_have_the_gradients_of_the_whole() -> None:
    whole, ids = opt().model.eval(), tokens()  # without dropout
    halves = copy.deepcopy(whole)

    whole(input_ids=ids, labels=ids).loss.backward()
    for half in ids.split(1):
        (halves(input_ids=half, labels=half).loss / 2).backward()

    for (name, a), (_, b) in zip(whole.named_parameters(), halves.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_accelerate_trains_it_as_a_plain_loop_does() -> None:
    model, x, y = two_processes.model_and_data()
    other = copy.deepcopy(model)
    two_processes.train(other, x, y)
    accelerator = Accelerator(cpu=True)

    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    for _ in range(two_processes.STEPS):
        optimizer.zero_grad()
        accelerator.backward((prepared(x) - y).square().mean())
        optimizer.step()

    assert all(torch.equal(value, parameters(other)[name]) for name, value in parameters(model).items())


def test_two_processes_train_it_as_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    model, x, y = two_processes.model_and_data()
    before = parameters(model)
    two_processes.train(model, x, y)

    program = "import sys, two_processes; two_processes.on_half_of_the_data(int(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": str(Path(two_processes.__file__).parent)}
    commands = [[*forked.python(), "-c", program, str(rank), str(tmp_path)] for rank in (0, 1)]
    running = [subprocess.Popen(command, env=environment) for command in commands]

    assert [process.wait() for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [name for name in first if "qsim_steps" in name] != []
    for name, value in parameters(model).items():
        assert not torch.equal(value, before[name])
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], value, atol=1e-6), name


def test_a_trainer_that_is_resumed_goes_the_way_of_one_that_was_not(tmp_path: Path) -> None:
    parts = {**LEARNED, "outputs": "tensor(int8(rounding=stochastic))"}
    constant = {"lr_scheduler_type": "constant"}
    unbroken = trainer(opt(**parts), tmp_path / "unbroken", **constant)
    unbroken.train()

    trainer(opt(**parts), tmp_path / "broken", max_steps=3, **constant).train()
    resumed = trainer(opt(**parts), tmp_path / "broken", **constant)
    resumed.train(resume_from_checkpoint=True)

    assert len(curve(unbroken)) == 6
    assert curve(resumed) == curve(unbroken)
    again = parameters(unbroken.model)
    assert all(torch.equal(value, again[name]) for name, value in parameters(resumed.model).items())


CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in inspect.signature(TrainingArguments).parameters:
    CHECKPOINTING = "gradient_checkpointing"  # the older name


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 2}, {"bf16": True}, {CHECKPOINTING: True}])
def test_the_trainer_takes_its_options(tmp_path: Path, changes: dict[str, Any]) -> None:
    simulation = opt()
    before = parameters(simulation.model)
    run = trainer(simulation, tmp_path, **changes, max_steps=20, learning_rate=3e-3)

    run.train()

    losses = curve(run)
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])
    moved = {name for name, value in parameters(simulation.model).items() if not torch.equal(value, before[name])}
    assert {name for name in before if "qsim_steps" in name} <= moved
    assert {value.dtype for value in parameters(simulation.model).values()} == {torch.float32}


def test_a_checkpoint_is_of_the_float32_model_and_what_its_sites_hold(tmp_path: Path) -> None:
    simulation = opt()

    trainer(simulation, tmp_path).train()

    saved = type(simulation.model).from_pretrained(tmp_path / "checkpoint-6").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in simulation.model.state_dict().items())
    held = read_state(tmp_path / "checkpoint-6" / "sites.safetensors")
    assert all(torch.equal(held[name], value) for name, value in simulation.state_dict().items())


def test_a_loss_that_is_nan_stops_at_its_step_and_names_the_layer(tmp_path: Path) -> None:
    simulation = opt()
    run, layer = trainer(simulation, tmp_path), simulation.model.model.decoder.layers[1].fc2

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * torch.nan if run.state.global_step == 4 else output

    layer.register_forward_hook(poison)
    with pytest.raises(qsim.TrainingError) as error:
        run.train()

    assert str(error.value) == (
        "step 5: the loss is nan; the first that is not finite is the output of model.decoder.layers.1.fc2"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert all(value.isfinite().all() for value in parameters(simulation.model).values())


def test_a_gradient_that_is_nan_stops_before_it_reaches_a_weight(tmp_path: Path) -> None:
    simulation = opt()
    before = parameters(simulation.model)
    simulation.model.model.decoder.layers[0].fc1.bias.register_hook(lambda gradient: gradient * torch.inf)

    with pytest.raises(qsim.TrainingError) as error:
        trainer(simulation, tmp_path).train()

    assert str(error.value) == (
        "step 1: the loss is finite and the gradient of model.decoder.layers.0.fc1.bias is not; lower --lr"
    )
    assert all(torch.equal(value, before[name]) for name, value in parameters(simulation.model).items())


def test_a_weight_that_is_nan_is_named() -> None:
    model, x, _ = two_processes.model_and_data()
    Watch(model, lambda: 7)
    with torch.no_grad():
        model[2].bias[0] = torch.nan  # type: ignore[index, union-attr]

    with pytest.raises(
        qsim.TrainingError, match=r"^step 7: the output is not finite, as 2.bias is not finite any more$"
    ):
        model(x)


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    simulation = opt()
    simulation.model.requires_grad_(False)

    with pytest.raises(
        qsim.ModelError, match=r"^every parameter of this OPTForCausalLM is frozen: there is nothing to"
    ):
        trainer(simulation, tmp_path).train()


def test_a_simulation_that_overwrites_its_weights_is_refused(tmp_path: Path) -> None:
    simulation = qsim.simulate(make("opt"), weights="int4", example={"input_ids": tokens()}, keep=False)

    with pytest.raises(
        qsim.QsimError, match=r"^this simulation was made with keep=False, which overwrites the weights"
    ):
        trainer(simulation, tmp_path).train()


def test_a_checkpoint_without_what_the_sites_held_is_one_line(tmp_path: Path) -> None:
    trainer(opt(), tmp_path, max_steps=3).train()
    (tmp_path / "checkpoint-3" / "sites.safetensors").unlink()

    with pytest.raises(
        qsim.ModelError, match=rf"^{tmp_path}/checkpoint-3 is damaged, or was not finished \(sites.safetensors\)"
    ):
        trainer(opt(), tmp_path).train(resume_from_checkpoint=True)


def test_the_last_complete_checkpoint_is_found(tmp_path: Path) -> None:
    trainer(opt(), tmp_path, save_steps=2).train()
    for name in ("optimizer.pt", "sha256.json"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
        kept = (tmp_path / "checkpoint-6" / name).read_bytes()
        (tmp_path / "checkpoint-6" / name).write_bytes(kept[:100])
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
        (tmp_path / "checkpoint-6" / name).write_bytes(kept)


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file may grow beyond `most` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [1_000, 20_000])
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_line(most: int, tmp_path: Path) -> None:
    run = trainer(opt(), tmp_path, SavingTrainer, max_steps=1)

    with full_disk(most), pytest.raises(qsim.TrainingError, match="^no checkpoint can be written: "):
        run.train()

    assert last_checkpoint(tmp_path) is None
