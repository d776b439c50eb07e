"""A `Trainer` that says in one line that it cannot write a checkpoint. Importing this imports transformers."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from transformers import Trainer

from qsim_core.errors import TrainingError, one_line


class SavingTrainer(Trainer):  # type: ignore[misc]
    """transformers' `Trainer`. Raises `TrainingError` for a checkpoint that cannot be written, as on a full disk."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            raise TrainingError(f"no checkpoint can be written: {one_line(error)}") from None
