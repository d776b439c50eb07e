"""The directory that a training writes: its plan, its checkpoints, the results before and after, and the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qsim_cache.sealing import damaged
from safetensors import SafetensorError

from qsim_core.errors import TrainingError, one_line
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.result import DataRecord
from qsim_core.files import writing
from qsim_finetune.trained import STATE
from qsim_finetune.training import Training

PLAN = "training.json"
"""The recipe, the data and the options, by which an interrupted run is known again."""
BEFORE = "before.json"
"""The result before the training."""
AFTER = "after.json"
"""The result after the training. A directory that has it holds a run that has ended."""
CURVE = "loss.svg"
CHECKPOINTS = "checkpoints"
FOLDED = "folded"
"""The model with its weights quantized."""


def plan_of(job: Job, data: DataRecord, training: Training) -> dict[str, Any]:
    """Everything that must be equal for a run to go on where another one stopped."""
    what = {"model": job.located.name, "data": data.sha256, **job.recipe.record()}
    return {**what, **training.model_dump(mode="json")}


def open_directory(output: Path, plan: dict[str, Any], resume: bool) -> None:
    """Make the directory of a run, or find an interrupted one. Raises `TrainingError` if it holds anything else."""
    path, checkpoints = output / PLAN, output / CHECKPOINTS
    if output.exists() and not output.is_dir():
        raise TrainingError(f"{output} is not a directory")
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise TrainingError(f"{output} holds files that are not of a training; name another --output")
    elif (output / AFTER).exists():
        raise TrainingError(f"{output} holds a run that has ended (qsim evaluate {output}); name another --output")
    elif last_checkpoint(checkpoints) is None:  # it had not got anywhere
        (output / BEFORE).unlink(missing_ok=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
    elif not resume:
        raise TrainingError(f"{output} holds another run; go on with it by --resume, or name another --output")
    else:
        _check_same(output, plan)
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make {output}: {error.strerror}") from None
    with writing(path) as file:
        file.write(json.dumps(plan, indent=2).encode() + b"\n")


def _check_same(output: Path, plan: dict[str, Any]) -> None:
    """Raise `TrainingError` if a directory holds a run of another plan."""
    try:
        before = dict(json.loads((output / PLAN).read_bytes()))
    except (OSError, ValueError, TypeError):
        raise TrainingError(f"{output / PLAN} is damaged; name another --output") from None
    for key, value in plan.items():
        if before.get(key) != value:
            raise TrainingError(
                f"{output} holds a run with {key} {before.get(key)!r}, not {value!r}; name another --output"
            )


def last_checkpoint(directory: Path) -> Path | None:
    """The last complete checkpoint of a `Trainer` with a `SimulationCallback`, whose `output_dir` this is."""
    numbered = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    newest = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in newest if not damaged(path, STATE)), None)


def drop_unfinished(directory: Path) -> None:
    """Remove the checkpoints after the last complete one: what a kill or a full disk has left of them."""
    last = last_checkpoint(directory)
    for path in directory.glob("checkpoint-*"):
        if path != last and damaged(path, STATE):
            shutil.rmtree(path, ignore_errors=True)


def save_model(loaded: LoadedModel, directory: Path, save: Callable[[Path], Any]) -> None:
    """Write a model, as `save` does, with its tokenizer and processor. Raises `TrainingError`."""
    try:
        save(directory)
        for part in (loaded.tokenizer, loaded.processor):
            if part is not None:
                part.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot save the model in {directory}: {one_line(error)}") from None
