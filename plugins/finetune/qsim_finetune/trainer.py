"""A simulated model in transformers' `Trainer`: one callback. Importing this imports transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsim_cache.sealing import damaged, seal
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qsim_core.errors import ModelError, QsimError
from qsim_core.simulation.simulation import Simulation
from qsim_core.transforms.run import Run
from qsim_finetune.damping import Damping
from qsim_finetune.distillation import DistillationTrainer
from qsim_finetune.divergence import Watch
from qsim_finetune.saving import SavingTrainer
from qsim_finetune.trained import STATE, read_state, write_state

if TYPE_CHECKING:
    from qsim_finetune.training import Training

WARMUP = 0.05
"""The share of the steps in which the learning rate goes up."""


class SimulationCallback(TrainerCallback):  # type: ignore[misc]
    """Saves the state of the sites in every checkpoint, and loads it where a run is resumed from one.

    A checkpoint has the SHA-256 of its files, written last; one that is damaged or was not finished is not taken up.
    Stops with `TrainingError` at the first loss or gradient that is NaN or Inf, before it has reached a weight. Raises
    `ModelError` for such a checkpoint, and for a model of which nothing trains. Raises `QsimError` for a simulation
    that cannot be saved or that does not keep the weights.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the model, and load the state of the sites if a checkpoint is resumed."""
        model = self.simulation.model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ModelError(f"every parameter of this {type(model).__name__} is frozen: there is nothing to train")
        if not self.simulation.keep:
            raise QsimError("this simulation was made with keep=False, which overwrites the weights that are to train")
        self.simulation.state_dict()
        if state.global_step:
            checkpoint = _checkpoint(args, state)
            if wrong := damaged(checkpoint, STATE):
                raise ModelError(f"{checkpoint} is damaged, or was not finished ({wrong[0]}); resume from another")
            self.simulation.load_state_dict(read_state(checkpoint / STATE))
        self.watch = Watch(model, lambda: state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the gradients before they change a weight; under float16 the Trainer's scaler does."""
        if self.watch is not None and not args.fp16:
            self.watch.check_gradients()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the state of the sites beside a checkpoint's weights, and then the digests of all its files."""
        if state.is_world_process_zero:
            write_state(_checkpoint(args, state) / STATE, self.simulation.state_dict())
        args.distributed_state.wait_for_everyone()  # each process has a file of its own there
        if state.is_world_process_zero:
            seal(_checkpoint(args, state), "**/*")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the checks."""
        if self.watch is not None:
            self.watch.remove()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class Ended(Exception):
    """The checkpoint that was taken up is of the last step; the Trainer would train for one more."""


class Shown(TrainerCallback):  # type: ignore[misc]
    """Shows loss and learning rate while a run goes on."""

    def __init__(self, run: Run, stack: ExitStack) -> None:
        self.run, self.stack, self.text = run, stack, "training"
        self.step: Callable[[str], None] = lambda text: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin where the run begins. Raises `Ended` if that is at its end."""
        if state.global_step >= state.max_steps:
            raise Ended
        self.step = self.stack.enter_context(self.run.count(state.max_steps, state.global_step, self.text))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """One step more."""
        if logs is not None and "loss" in logs:
            self.step(f"loss {logs['loss']:.3f}, lr {logs['learning_rate']:.1e}")


def trainer(
    simulation: Simulation,
    samples: Any,
    training: Training,
    directory: Path,
    device: str,
    run: Run,
    stack: ExitStack,
    teacher: nn.Module | None = None,
) -> Trainer:
    """transformers' `Trainer` for a simulated model, which learns the teacher's outputs if there is one.

    It logs every step and keeps the last two checkpoints.
    """
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.learning_rate,
        warmup_steps=WARMUP,
        seed=training.seed,
        bf16=training.bf16,
        use_cpu=device == "cpu",
        save_steps=training.checkpoint_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        report_to="none",
    )
    callbacks: list[TrainerCallback] = [SimulationCallback(simulation), Shown(run, stack)]
    callbacks += [Damping(simulation, training.damping)] if training.damping else []
    if teacher is None:
        made = SavingTrainer(simulation.model, arguments, train_dataset=samples, callbacks=callbacks)
    else:
        made = DistillationTrainer(
            simulation.model,
            arguments,
            train_dataset=samples,
            callbacks=callbacks,
            teacher=teacher,
            hidden=training.hidden,
        )
    made.remove_callback(PrinterCallback)
    return made
