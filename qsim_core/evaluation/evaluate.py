"""One run: the model as it is, then under the recipe, and the record of both."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsim_core.components.host import Host, installed
from qsim_core.errors import DataError, RecipeError, one_line
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.baseline_cache import baseline_entry, cached_baseline
from qsim_core.evaluation.data import Calibration, Data
from qsim_core.evaluation.evaluator import Evaluator
from qsim_core.evaluation.job import Job, check_machine
from qsim_core.evaluation.metrics import Metrics, intervals, without_score
from qsim_core.evaluation.record import calibration_record, data_record, description
from qsim_core.evaluation.result import Result
from qsim_core.files import make_work_dir
from qsim_core.simulation.environment import Environment
from qsim_core.simulation.recipe import Recipe
from qsim_core.simulation.simulation import simulate
from qsim_core.simulation.work import Hardware
from qsim_core.snapshots import digest
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_core.transforms.offload import state
from qsim_core.transforms.run import Run


def evaluate(
    recipe: Recipe | Mapping[str, Any],
    *,
    host: Host | None = None,
    data: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    calibration: Calibration | None = None,
    samples: Path | None = None,
    run: Run | None = None,
    on: Sequence[Hardware] = (),
) -> Result:
    """Measure a model as it is and under a recipe; `samples` is a directory for what a person would look at.

    `on` has hardware, for which the audit says what its batch costs under the recipe.
    Raises a `QsimError` that says what to do.
    """
    host, run, start = host or installed(), run or Run(), time.perf_counter()
    recipe = Recipe.of(recipe, host)
    with run.stage(f"looking for {recipe.model or 'the default model'}"):
        job = Job.of(recipe, host)
    if not job.recipe.quantizes and not job.recipe.transforms:
        raise RecipeError("the recipe quantizes nothing; name weights, activations or outputs")
    _check_samples(job.evaluator, samples)
    if run.work_dir is not None:
        make_work_dir(run.work_dir)
    check_machine(device, dtype)
    with run.stage(f"loading {job.located.name}"):
        dataset = job.data(data)
        given = calibration or Calibration()
        seen = job.calibration(given)
        loaded = job.load(device, dtype)
        weights = digest(state(loaded.model))
    example = job.evaluator.example(loaded, dataset)
    batches = None
    if seen is not None:
        batches = job.evaluator.calibration(loaded, seen, given.samples, given.length, run.seed)
    with run.stage("looking for matmuls"):
        if example is not None:  # a recipe that does not fit the model fails before the baseline has run for an hour
            try:
                simulate(loaded.model, job.recipe.model_copy(update={"transforms": ()}), example=example).restore()
            except Exception:
                _check_runs(job.evaluator, loaded, example)
                raise
    entry = None if samples is not None else baseline_entry(job, host, loaded, dataset, run, device, dtype)
    before = time.perf_counter()
    baseline, cached = cached_baseline(
        entry, lambda: _metrics(job.evaluator, loaded, dataset, run, f"{dtype} baseline")
    )
    baseline_seconds = time.perf_counter() - before
    with run.stage("quantizing weights") if batches is None else nullcontext():  # transforms show their own progress
        simulation = simulate(
            loaded.model,
            job.recipe,
            example=example,
            calibration=batches,
            structure=job.located.adapter.structure(loaded.model),
            state=job.state(),
            keep=False,
            run=run,
        )
        audit = simulation.audit(on=on)
    before = time.perf_counter()
    compared = replace(run, reference=getattr(baseline, "outputs", None))
    simulated = _metrics(job.evaluator, loaded, dataset, compared, "simulated")
    simulated_seconds = time.perf_counter() - before
    if samples is not None:
        _save_samples(job.evaluator, baseline, simulated, samples)
    return Result(
        **description(job, loaded, dataset, host, on),
        weights=weights,
        metric=job.evaluator.metric or next(iter(baseline)),
        baseline=baseline,
        simulated=simulated,
        intervals=intervals(baseline, simulated),
        samples=simulated.size if isinstance(simulated, Metrics) else None,
        audit=audit,
        environment=Environment.here(device, dtype, loaded.model),
        data=data_record(data, dataset),
        calibration=None if seen is None else calibration_record(given, seen),
        transforms=simulation.reports,
        warnings=[
            *without_score(baseline, "baseline"),
            *without_score(simulated, "simulated"),
            *job.notes(dtype),
            *simulation.warnings,
            *audit.warnings,
        ],
        batch_size=run.batch_size,
        limit=run.limit,
        seed=run.seed,
        seconds={
            "baseline": baseline_seconds,
            "simulated": simulated_seconds,
            "total": time.perf_counter() - start,
        },
        cached=[*(["baseline"] if cached else []), *simulation.cached],
    )


def _check_runs(evaluator: Evaluator, loaded: LoadedModel, example: Any) -> None:
    """Raise `DataError` if the model as it is cannot run on the evaluator's example."""
    try:
        with as_in_evaluation(loaded.model):
            call(loaded.model, example)
    except Exception as error:  # models raise errors of any class
        raise DataError(
            f"the model, {type(loaded.model).__name__}, cannot run on the example of {evaluator}: {one_line(error)}"
        ) from error


def _metrics(evaluator: Evaluator, loaded: LoadedModel, data: Data, run: Run, label: str) -> dict[str, float]:
    """The metrics of one pass over the data; its progress is shown under a label."""
    return evaluator.measure(loaded, data, replace(run, track=lambda items, total, _: run.track(items, total, label)))


def _check_samples(evaluator: Evaluator, directory: Path | None) -> None:
    """Raise `DataError` before hours of work if there will be no samples to save, or no place for them."""
    if directory is None:
        return
    if type(evaluator).save_samples is Evaluator.save_samples:
        raise DataError(f"{evaluator.name} makes no samples that could be saved")
    if directory.exists() and not directory.is_dir():
        raise DataError(f"cannot save samples in {directory}: it is not a directory")


def _save_samples(evaluator: Evaluator, baseline: Any, simulated: Any, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        evaluator.save_samples(baseline.outputs, simulated.outputs, directory)
    except OSError as error:
        raise DataError(f"cannot save samples in {directory}: {error.strerror or error}") from None
