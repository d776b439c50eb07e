"""Training towards a teacher's outputs: the loss, the positions that it ignores, and the command."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import make, tokens
from qsim_finetune.distillation import DistillationTrainer, distance, divergence, hidden_error
from qsim_finetune.finetuning import finetune
from qsim_finetune.training import Training
from test_finetuning import result
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering, TrainingArguments

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


def test_the_error_of_hidden_states_is_relative_in_each_layer_and_without_padding() -> None:
    taught = [torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[[0.0, 10.0], [9.0, 9.0]]])]
    states = [torch.tensor([[[3.0, 5.0], [0.0, 0.0]]]), torch.tensor([[[2.0, 10.0], [0.0, 0.0]]])]

    error = hidden_error(states, taught, torch.tensor([[1, 0]]))

    torch.testing.assert_close(error, torch.tensor((1 / 25 + 4 / 100) / 2))


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


def test_the_ends_of_an_answer_are_two_divergences_over_the_tokens() -> None:
    start, end = torch.randn(2, 3, 7).unbind()
    mine, wanted = (SimpleNamespace(start_logits=a, end_logits=b) for a, b in ((start, end), (end, end)))

    torch.testing.assert_close(distance(mine, wanted), divergence(start, end) / 2)


def test_the_error_of_a_denoiser_is_relative() -> None:
    mine, wanted = (SimpleNamespace(sample=torch.tensor([[[[3.0, x]]]])) for x in (5.0, 4.0))

    torch.testing.assert_close(distance(mine, wanted), torch.tensor(1 / 25))


def brought_nearer(student: Any, teacher: Any, samples: list[dict[str, Tensor]], rate: float, directory: Path) -> float:
    """Train a model towards a teacher. Gives the distance on the samples after the training, as a share of before."""
    arguments = TrainingArguments(str(directory), **{**OPTIONS, "learning_rate": rate, "max_steps": 12})
    trainer = DistillationTrainer(student, arguments, train_dataset=samples, eval_dataset=samples, teacher=teacher)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return float(trainer.evaluate()["eval_loss"] / before)


def test_question_answering_learns_from_its_own_answers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = BertForQuestionAnswering(BertConfig(**sizes, intermediate_size=32)).eval()
    teacher, ids = copy.deepcopy(student), torch.randint(64, (4, 12))
    samples = [{"input_ids": row, "start_positions": torch.tensor(0), "end_positions": torch.tensor(0)} for row in ids]
    qsim.simulate(student, weights="int2", example={"input_ids": ids})

    assert brought_nearer(student, teacher, samples, 3e-3, tmp_path) < 0.8


def test_a_denoiser_learns_what_it_predicted_on_its_own_paths(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    loaded = qsim.parse("zoo.zoo").load("ddpm-tiny", torch.float32)
    denoising, teacher = qsim.parse("denoising(2)"), copy.deepcopy(loaded.model)
    batches = denoising.calibration(loaded, denoising.default_data(), 8, None, 0)
    qsim.simulate(loaded.model, weights="int3", example=batches[0])
    samples = [{name: value[0] for name, value in batch.items()} for batch in batches]

    assert brought_nearer(loaded.model, teacher, samples, 1e-4, tmp_path) < 0.8


def test_hidden_states_come_nearer_to_the_teachers(tmp_path: Path) -> None:
    ids = tokens()
    samples = [{"input_ids": row, "labels": row} for row in ids]

    def error_after(hidden: float) -> float:
        student, teacher = make("llama").train(), make("llama")
        qsim.simulate(student, weights="int2", activations="int4", example={"input_ids": ids})
        arguments = TrainingArguments(str(tmp_path), **{**OPTIONS, "learning_rate": 1e-3, "max_steps": 15})
        DistillationTrainer(student, arguments, train_dataset=samples, teacher=teacher, hidden=hidden).train()
        with torch.no_grad():
            mine, wanted = (model.eval()(ids, output_hidden_states=True).hidden_states for model in (student, teacher))
        return float(hidden_error(mine, wanted))

    assert error_after(hidden=10.0) < 0.8 * error_after(hidden=0.0)


def test_hidden_states_without_a_teacher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        qsim.RecipeError, match=r"^the error of hidden states is part of the loss of --distill; name it"
    ):
        finetune({"model": "vit-tiny", "weights": "int4"}, tmp_path / "run", Training(hidden=1.0))


def test_the_command_brings_a_quantized_model_nearer_to_its_own_float32_outputs(tmp_path: Path) -> None:
    finetuned = result(
        "vit-tiny", "--plugin", "abfp", "--precision", "w2a4", "--steps", 12, "--lr", "1e-3", "--batch-size", 16,
        "--limit", 32, "--distill", "--output", tmp_path / "vit",
    )  # fmt: skip

    before, after = (run.simulated["nll"] for run in (finetuned.before, finetuned.after))
    assert finetuned.training.distill
    assert after < 0.8 * before
