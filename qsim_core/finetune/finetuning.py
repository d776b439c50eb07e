"""Train a model under a recipe: weights are float32 masters, quantized anew in every step.

The model is measured under the recipe before it trains and after, from the directory that the training has left: what
`qsim evaluate DIR` says of it later is what was said at the end. transformers' `Trainer` does the training.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from qsim_core.components.host import Host, installed
from qsim_core.errors import DataError, ModelError, RecipeError, TrainingError
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.data import Calibration, Data
from qsim_core.evaluation.evaluate import evaluate
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.record import from_anywhere
from qsim_core.evaluation.result import DataRecord, Result
from qsim_core.evaluation.trained import STATE, Trained, write_state
from qsim_core.files import writing
from qsim_core.finetune.curve import loss_curve
from qsim_core.simulation.recipe import Recipe
from qsim_core.simulation.simulation import Simulation, simulate
from qsim_core.transforms.run import Run

PLAN, BEFORE, AFTER, CURVE, CHECKPOINTS, FOLDED = (
    "training.json", "before.json", "after.json", "loss.svg", "checkpoints", "folded",
)  # fmt: skip


class Training(BaseModel):
    """How a model is trained: AdamW, the learning rate going up over 5% of the steps and then down to 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(None, ge=1, description="optimizer steps; none: as many as the epochs have")
    epochs: float = Field(1.0, gt=0, description="passes over the data, where steps are not given")
    batch_size: int = Field(8, ge=1, description="samples computed at a time")
    accumulate: int = Field(1, ge=1, description="batches whose gradients make one step")
    learning_rate: float = Field(1e-4, gt=0, description="at its highest")
    seqlen: int | None = Field(None, description="tokens of a sample; none: what the evaluator takes")
    distill: bool = Field(False, description="learn the float32 model's outputs instead of the data's labels")
    control: bool = Field(False, description="train in float32, so that what training alone does can be seen")
    seed: int = Field(0, description="of the order of samples and of dropout")
    checkpoint_every: int = Field(100, ge=1, description="steps from one checkpoint to the next")
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    bf16: bool = Field(False, description="bfloat16 autocast; weights and their quantization stay float32")


class Logged(BaseModel):
    """One step of a training: the loss of its samples, and the learning rate."""

    step: int
    loss: float
    learning_rate: float


class Finetuned(BaseModel):
    """A training under a recipe: the model before and after, and how it came there."""

    before: Result
    after: Result
    training: Training
    data: DataRecord
    log: list[Logged]
    left_unfolded: list[str] = Field(default=[], description="weights that --fold had to leave as they are")
    seconds: float = Field(description="of the training itself")

    def write(self, path: Path) -> None:
        """Write JSON to a file, whole or not at all. Raises `QsimError`."""
        with writing(path) as file:
            file.write(self.model_dump_json(indent=2).encode() + b"\n")


def finetune(
    recipe: Recipe | Mapping[str, Any],
    output: Path,
    training: Training | None = None,
    *,
    host: Host | None = None,
    data: str | None = None,
    eval_data: str | None = None,
    device: str = "cpu",
    calibration: Calibration | None = None,
    resume: bool = False,
    fold: bool = False,
    run: Run | None = None,
) -> Finetuned:
    """Train a model under a recipe, transforms first, on `data` (none: the train split of the model's own).

    `output` then holds the float32 model, `qsim.json` and `sites.safetensors`, checkpoints, and `loss.svg`; with `fold`
    also `folded`, the model with its weights quantized. With `resume` an interrupted run goes on from its last
    checkpoint. Raises a `QsimError` that says what to do.
    """
    host, run, training = host or installed(), run or Run(), training or Training()
    _check_trainer()
    with run.stage("looking at model and data"):
        job = Job.of(Recipe.of(recipe, host), host)
        if not job.recipe.quantizes:
            raise RecipeError("the recipe quantizes nothing; name weights, activations or outputs")
        taught = _taught(job, data)
        measured_on = _measured_on(job, data, eval_data)
        source = DataRecord(name=taught.name, sha256=taught.sha256, source=from_anywhere(data))
        job.evaluator.training(_loaded(job), taught, training.seqlen)  # tells now what would stop it after hours
        _open(output, _plan(job, source, training), resume)
    given = calibration or Calibration()
    if (output / BEFORE).exists():
        before = Result.read(output / BEFORE)
    else:
        before = evaluate(recipe, host=host, data=measured_on, device=device, calibration=given, run=run)
        before.write(output / BEFORE)
    start = time.perf_counter()
    log, unfolded = _train(job, taught, output, training, device, given, fold, run)
    seconds = time.perf_counter() - start
    Trained(
        base=job.located.name,
        recipe=job.recipe.record(),
        evaluator=str(job.evaluator),
        data=from_anywhere(measured_on),
    ).write(output)
    after = evaluate(Recipe.of({"model": str(output)}, host), host=host, device=device, run=run)
    after.write(output / AFTER)
    return Finetuned(
        before=before,
        after=after,
        training=training,
        data=source,
        log=log,
        left_unfolded=unfolded,
        seconds=seconds,
    )


def _check_trainer() -> None:
    for library in ("transformers", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise ModelError(f"training needs transformers and accelerate; pip install {library}")


def _taught(job: Job, source: str | None) -> Data:
    """What the model is trained on. Raises `DataError` if nothing is named and it comes without."""
    if source is not None:
        return job.evaluator.read(source, split="train")
    if job.located.calibration is None:
        raise DataError(f"{job.located.name} comes without data to train on; name some with --data")
    return job.located.calibration()


def _measured_on(job: Job, data: str | None, eval_data: str | None) -> str | None:
    """What it is measured on, as `--data` of an evaluation: none where it comes with data of its own."""
    trained = job.located.trained
    own = job.located.data is not None or (trained is not None and trained.data is not None)
    if eval_data is not None or own or job.evaluator.default_data() is not None:
        return eval_data
    if data is None or Path(data).expanduser().is_file() or data.count(":") > 1:
        raise DataError(f"{job.located.name} has nothing to be measured on but what it trains on; name --eval-data")
    return data  # its test split


def _plan(job: Job, data: DataRecord, training: Training) -> dict[str, Any]:
    """What makes a run the same run."""
    what = {"model": job.located.name, "data": data.sha256, **job.recipe.record()}
    return {**what, **training.model_dump(mode="json")}


def _open(output: Path, plan: dict[str, Any], resume: bool) -> None:
    """Make the directory of a run, or find an interrupted one. Raises `TrainingError` if it holds anything else."""
    path = output / PLAN
    checkpoints = any((output / CHECKPOINTS).glob("checkpoint-*"))
    if output.exists() and not output.is_dir():
        raise TrainingError(f"{output} is no directory")
    if path.exists() and not checkpoints and not (output / AFTER).exists():  # it had not got anywhere
        for stale in (path, output / BEFORE):
            stale.unlink(missing_ok=True)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise TrainingError(f"{output} holds files that are of no training; name another --output")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot make {output}: {error.strerror}") from None
        with writing(path) as file:
            file.write(json.dumps(plan, indent=2).encode() + b"\n")
        return
    if (output / AFTER).exists():
        raise TrainingError(f"{output} holds a run that has ended (qsim evaluate {output}); name another --output")
    if not resume:
        raise TrainingError(f"{output} holds another run; go on with it by --resume, or name another --output")
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in plan.items():
        if before.get(key) != value:
            raise TrainingError(
                f"{output} holds a run with {key} {before.get(key)!r}, not {value!r}; name another --output"
            )


def _train(
    job: Job, taught: Data, output: Path, training: Training, device: str, given: Calibration, fold: bool, run: Run
) -> tuple[list[Logged], list[str]]:
    """Train and save; the log, and the weights that could not be folded."""
    from transformers.trainer_utils import get_last_checkpoint

    from qsim_core.finetune.trainer import Ended, trainer

    loaded = _loaded(job)
    samples = job.evaluator.training(loaded, taught, training.seqlen)
    teacher = copy.deepcopy(loaded.model) if training.distill else None
    simulation = _simulated(job, loaded, taught, given, run)
    simulation.state_dict()  # tells now what could not be saved at the end
    simulation.sites.quantizing = not training.control
    checkpoints = output / CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    if training.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    with contextlib.ExitStack() as shown, torch.random.fork_rng(devices=[]):
        at_work = trainer(simulation, samples, training, checkpoints, device, run, shown, teacher)
        try:
            with contextlib.suppress(Ended):
                at_work.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)))
        except TrainingError as error:
            last = get_last_checkpoint(str(checkpoints))
            kept = f"the last good checkpoint is {last}" if last else "there was no checkpoint yet"
            raise TrainingError(f"{error}; {kept}") from None
    log = [
        Logged(step=entry["step"], loss=entry["loss"], learning_rate=entry["learning_rate"])
        for entry in at_work.state.log_history
        if "loss" in entry
    ]
    with writing(output / CURVE) as file:
        title = f"{job.located.name}: training loss"
        file.write(loss_curve([e.step for e in log], [e.loss for e in log], title).encode())
    simulation.sites.quantizing = True
    loaded.model.to("cpu").eval()
    write_state(output / STATE, simulation.state_dict())
    _save(loaded, output, None)
    if not fold:
        return log, []
    tensors, left = simulation.folded_state_dict()
    _save(loaded, output / FOLDED, tensors)
    return log, left


def _loaded(job: Job) -> LoadedModel:
    return job.located.adapter.load(job.located.source, torch.float32)


def _simulated(job: Job, loaded: LoadedModel, taught: Data, given: Calibration, run: Run) -> Simulation:
    seen = job.calibration(given)
    batches = None
    if seen is not None:
        batches = job.evaluator.calibration(loaded, seen, given.samples, given.length, run.seed)
    return simulate(
        loaded.model,
        job.recipe,
        example=job.evaluator.example(loaded, taught),
        calibration=batches,
        structure=job.located.adapter.structure(loaded.model),
        state=job.state(),
        run=run,
    )


def _save(loaded: LoadedModel, directory: Path, tensors: dict[str, torch.Tensor] | None) -> None:
    """A model with what prepares its inputs, as `from_pretrained` reads it."""
    model: Any = loaded.model
    try:
        model.save_pretrained(directory, state_dict=tensors)
        for part in (loaded.tokenizer, loaded.processor):
            if part is not None:
                part.save_pretrained(directory)
    except OSError as error:
        raise TrainingError(f"cannot save the model in {directory}: {error.strerror or error}") from None
