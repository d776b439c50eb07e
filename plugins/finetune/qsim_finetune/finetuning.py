"""Train a model under a recipe: weights are float32 masters, quantized again in every step.

The model is measured under the recipe before it trains and after. The second result is that of the directory which the
training has written, so `qsim evaluate DIR` gives it again. transformers' `Trainer` does the training.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from qsim_cache.sealing import damaged, seal
from torch import Tensor, nn

from qsim_core.components.host import Host, installed
from qsim_core.errors import ModelError, RecipeError, TrainingError
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.bench import evaluate
from qsim_core.evaluation.data import Calibration, Data
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.record import from_anywhere
from qsim_core.evaluation.result import DataRecord, Result
from qsim_core.files import writing
from qsim_core.simulation.recipe import Recipe
from qsim_core.simulation.simulation import Simulation, simulate
from qsim_core.transforms.run import Run
from qsim_finetune.loss_curve import loss_curve
from qsim_finetune.output_directory import (
    AFTER,
    BEFORE,
    CHECKPOINTS,
    CURVE,
    FOLDED,
    drop_unfinished,
    last_checkpoint,
    open_directory,
    plan_of,
    save_model,
)
from qsim_finetune.rates import losses_of, steps_of_a_trial
from qsim_finetune.trained import STATE, Trained, write_state
from qsim_finetune.training import Finetuned, Logged, Training
from qsim_finetune.training_data import measured_on, training_data


def finetune(
    recipe: Recipe | Mapping[str, Any],
    output: Path,
    training: Training | None = None,
    *,
    host: Host | None = None,
    data: str | None = None,
    eval_data: str | None = None,
    valid_data: str | None = None,
    device: str = "cpu",
    calibration: Calibration | None = None,
    resume: bool = False,
    fold: bool = False,
    run: Run | None = None,
) -> Finetuned:
    """Train a model under a recipe, transforms first, on `data` (none: the train split of the model's own).

    `output` then holds the float32 model, `qsim.json` and `sites.safetensors`, checkpoints, and `loss.svg`; with `fold`
    also `folded`, the model with its weights quantized. With `resume` an interrupted run goes on from its last
    checkpoint. Of several `rates` the one is taken that has the least loss on `valid_data` after a fifth of the steps.
    Raises a `QsimError` that says what to do.
    """
    host, run, training = host or installed(), run or Run(), training or Training()
    _check_trainer()
    if training.hidden and not training.distill:
        raise RecipeError("the error of hidden states is part of the loss of --distill; name it too")
    if training.damping and training.control:
        raise RecipeError("--control trains in float32, where no weight is rounded; leave --damping out")
    if bool(training.rates) != (valid_data is not None):
        raise RecipeError("several learning rates and --valid-data, on which they are compared, belong together")
    with run.stage("looking at model and data"):
        job = Job.of(Recipe.of(recipe, host), host)
        if not job.recipe.quantizes:
            raise RecipeError("the recipe quantizes nothing; name weights, activations or outputs")
        taught = training_data(job, data)
        measured = measured_on(job, data, eval_data)
        source = DataRecord(name=taught.name, sha256=taught.sha256, source=from_anywhere(data))
        # raises now for data that the model cannot train on
        job.evaluator.training(_loaded(job), taught, training.seqlen)
        open_directory(output, plan_of(job, source, training), resume)
    given = calibration or Calibration()
    if BEFORE not in damaged(output, BEFORE):
        before = Result.read(output / BEFORE)
    else:
        before = evaluate(recipe, host=host, data=measured, device=device, calibration=given, run=run)
        before.write(output / BEFORE)
        seal(output)
    start = time.perf_counter()
    Trained(
        base=job.located.name,
        recipe=job.recipe.record(),
        evaluator=str(job.evaluator),
        data=from_anywhere(measured),
    ).write(output)
    tried: dict[float, float] = {}
    if valid_data is not None:
        held = job.evaluator.read(valid_data, split="validation")
        tried = losses_of(training.rates, partial(_trial, job, taught, held, training, device, given, run), output)
        training = training.model_copy(update={"learning_rate": min(tried, key=lambda rate: tried[rate])})
    log, unfolded = _train(job, taught, output, training, device, given, fold, run)
    seal(output)
    seconds = time.perf_counter() - start
    after = evaluate(Recipe.of({"model": str(output)}, host), host=host, device=device, run=run)
    after.write(output / AFTER)
    return Finetuned(
        before=before,
        after=after,
        training=training,
        data=source,
        log=log,
        tried=tried,
        left_unfolded=unfolded,
        seconds=seconds,
    )


def _check_trainer() -> None:
    for library in ("transformers", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise ModelError(f"training needs transformers and accelerate; pip install {library}")


def _train(
    job: Job, taught: Data, output: Path, training: Training, device: str, given: Calibration, fold: bool, run: Run
) -> tuple[list[Logged], list[str]]:
    """Train and save. Returns the loss of each step, and the weights that could not be folded."""
    from qsim_transformers import save_pretrained

    from qsim_finetune.trainer import Ended, trainer

    loaded = _loaded(job)
    samples, teacher, simulation = _student(job, loaded, taught, training, given, run)
    checkpoints = output / CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    drop_unfinished(checkpoints)
    if training.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    with contextlib.ExitStack() as shown, torch.random.fork_rng(devices=[]):
        at_work = trainer(simulation, samples, training, checkpoints, device, run, shown, teacher)
        try:
            with contextlib.suppress(Ended):
                last = last_checkpoint(checkpoints)
                at_work.train(resume_from_checkpoint=None if last is None else str(last))
        except TrainingError as error:
            last = last_checkpoint(checkpoints)
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
    save_model(loaded, output, partial(save_pretrained, simulation))
    if not fold:
        return log, []
    tensors, left = simulation.folded_state_dict()
    model: Any = loaded.model
    save_model(loaded, output / FOLDED, partial(model.save_pretrained, state_dict=tensors))
    return log, left


def _trial(
    job: Job, taught: Data, held: Data, training: Training, device: str, given: Calibration, run: Run, rate: float
) -> float:
    """Train a fifth of the steps at a learning rate. Gives the loss on held-out data."""
    from qsim_finetune.trainer import trainer

    loaded = _loaded(job)
    samples, teacher, simulation = _student(job, loaded, taught, training, given, run)
    at_once = training.batch_size * training.accumulate
    steps = steps_of_a_trial(training.steps, len(samples), training.epochs, at_once)
    trial = training.model_copy(update={"learning_rate": rate, "steps": steps})
    with TemporaryDirectory() as folder, contextlib.ExitStack() as shown, torch.random.fork_rng(devices=[]):
        at_work = trainer(simulation, samples, trial, Path(folder), device, run, shown, teacher)
        at_work.train()
        loss: float = at_work.evaluate(job.evaluator.training(loaded, held, training.seqlen))["eval_loss"]
    return loss


def _student(
    job: Job, loaded: LoadedModel, taught: Data, training: Training, given: Calibration, run: Run
) -> tuple[Sequence[dict[str, Tensor]], nn.Module | None, Simulation]:
    """The samples, the teacher if there is one, and the simulation of a model that is to be trained."""
    samples = job.evaluator.training(loaded, taught, training.seqlen)
    teacher = copy.deepcopy(loaded.model) if training.distill else None
    simulation = _simulated(job, loaded, taught, given, run)
    simulation.state_dict()  # raises now if it could not be saved at the end
    simulation.sites.quantizing = not training.control
    return samples, teacher, simulation


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
