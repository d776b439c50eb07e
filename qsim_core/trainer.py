"""A simulated model in transformers' `Trainer`: one callback. Importing this imports transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qsim_core.divergence import Watch
from qsim_core.errors import ModelError
from qsim_core.simulation import Simulation
from qsim_core.trained import STATE, read_state, write_state


class SimulationCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps what the sites hold in every checkpoint, and takes it up again where a run is resumed from one.

    Stops with `TrainingError` at the first loss or gradient that is NaN or Inf, before it has reached a weight. Raises
    `ModelError` for a model of which nothing trains, and `QsimError` for a simulation that cannot be saved.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check what can be checked, and take up what the sites held, if a checkpoint is resumed."""
        model = self.simulation.model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ModelError(f"every parameter of this {type(model).__name__} is frozen: there is nothing to train")
        self.simulation.state_dict()
        if state.global_step:
            self.simulation.load_state_dict(read_state(_checkpoint(args, state) / STATE))
        self.watch = Watch(model, lambda: state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the gradients, while the weights are as they were; under float16 the Trainer's scaler does."""
        if self.watch is not None and not args.fp16:
            self.watch.check_gradients()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put what the sites hold beside a checkpoint's weights."""
        if state.is_world_process_zero:
            write_state(_checkpoint(args, state) / STATE, self.simulation.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look no more."""
        if self.watch is not None:
            self.watch.remove()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
