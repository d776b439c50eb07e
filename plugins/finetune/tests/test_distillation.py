"""Training towards a teacher's outputs: the loss, the positions that it ignores, and the command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qsim_finetune.distillation import DistillationTrainer, divergence
from test_finetuning import result
from torch import Tensor, nn
from transformers import TrainingArguments

import qsim_core as qsim

OPTIONS = {
    "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "report_to": "none",
    "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no", "remove_unused_columns": False,
}  # fmt: skip


def test_it_is_the_kullback_leibler_divergence() -> None:
    taught = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]).log()
    logits = torch.tensor([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]).log()

    expected = (0.5 * torch.tensor(2.0).log() - 0.25 * torch.tensor(2.0).log()) / 2  # and 0 of the second row

    torch.testing.assert_close(divergence(logits, taught), expected)


def test_positions_that_are_padding_do_not_count() -> None:
    logits, taught = torch.randn(2, 3, 5), torch.randn(2, 3, 5)

    masked = divergence(logits, taught, torch.tensor([[1, 1, 0], [1, 0, 0]]))

    torch.testing.assert_close(masked, divergence(logits.flatten(0, 1)[[0, 1, 3]], taught.flatten(0, 1)[[0, 1, 3]]))


class Net(nn.Module):
    """A net that maps vectors to logits, with dropout only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Any = None) -> Any:
        assert labels is None
        return SimpleNamespace(logits=self.linear(x))


def trained(directory: Path, **changes: Any) -> tuple[list[float], Net]:
    """Train a simulated net towards the outputs of another one. Gives the losses, and the other net."""
    torch.manual_seed(0)
    student, teacher = Net(), Net()
    samples = [{"x": x, "labels": torch.tensor(0)} for x in torch.randn(32, 8)]
    qsim.simulate(student, weights="channel(int4)", example={"x": torch.zeros(1, 8)})
    arguments = TrainingArguments(str(directory), **{**OPTIONS, **changes})
    trainer = DistillationTrainer(student, arguments, train_dataset=samples, teacher=teacher)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], teacher


def test_a_quantized_model_learns_what_the_teacher_gives_without_labels(tmp_path: Path) -> None:
    losses, teacher = trained(tmp_path, num_train_epochs=10)

    assert sum(losses[-10:]) < sum(losses[:10]) / 5
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_two_halves_of_a_batch_weigh_as_the_whole(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path, per_device_train_batch_size=4, max_steps=5)
    halves, _ = trained(tmp_path, gradient_accumulation_steps=2, max_steps=5)

    assert halves == pytest.approx(whole, rel=1e-4)


def test_a_model_without_logits_has_nothing_to_teach(tmp_path: Path) -> None:
    class Bare(Net):
        def forward(self, x: Tensor, labels: Any = None) -> Any:
            return SimpleNamespace(states=self.linear(x))

    arguments = TrainingArguments(str(tmp_path), **OPTIONS)
    trainer = DistillationTrainer(Bare(), arguments, train_dataset=[{"x": torch.zeros(8)}], teacher=Bare())

    with pytest.raises(
        qsim.QsimError, match=r"^the model gives a SimpleNamespace without logits to learn; leave --distill out$"
    ):
        trainer.train()


def test_the_command_brings_a_quantized_model_nearer_to_its_own_float32_outputs(tmp_path: Path) -> None:
    finetuned = result(
        "vit-tiny", "--plugin", "abfp", "--precision", "w2a4", "--steps", 12, "--lr", "1e-3", "--batch-size", 16,
        "--limit", 32, "--distill", "--output", tmp_path / "vit",
    )  # fmt: skip

    before, after = (run.simulated["nll"] for run in (finetuned.before, finetuned.after))
    assert finetuned.training.distill
    assert after < 0.8 * before
