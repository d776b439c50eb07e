"""One run: the model as it is, then under the recipe, and the record of both. A bench keeps the model for more runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qsim_core.components.component import components_in
from qsim_core.components.host import Host, installed
from qsim_core.errors import DataError, RecipeError, one_line
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.data import Calibration, Data
from qsim_core.evaluation.evaluator import Evaluator
from qsim_core.evaluation.job import Job, check_machine, load
from qsim_core.evaluation.locate import default_model, locate
from qsim_core.evaluation.metrics import Metrics, intervals, without_score
from qsim_core.evaluation.record import calibration_record, data_record, description
from qsim_core.evaluation.result import Result
from qsim_core.simulation.environment import Environment
from qsim_core.simulation.recipe import Recipe
from qsim_core.simulation.simulation import simulate
from qsim_core.simulation.work import Hardware
from qsim_core.sites.executor import SiteObserver
from qsim_core.snapshots import digest
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_core.transforms.offload import state
from qsim_core.transforms.run import Run
from qsim_core.transforms.store import Store


@dataclass(frozen=True)
class Measured:
    """A result, and the metrics of both runs with their samples, from which other results can be compared with it."""

    result: Result
    baseline: dict[str, float]
    simulated: dict[str, float]


class Bench:
    """A model that is loaded once, measured once as it is, and then under one recipe after another."""

    def __init__(
        self, model: str | None = None, *, host: Host | None = None, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        """`model` is a directory, a hub name, or a name that a plugin brings; it is loaded when first measured."""
        check_machine(device, dtype)
        self.host, self.device, self.dtype = host or installed(), device, dtype
        self.located = locate(default_model(self.host) if model is None else model, self.host)
        self.weights = ""
        """Digest of the parameters and buffers as they were loaded."""
        self._loaded: LoadedModel | None = None
        self._baselines: dict[tuple[Any, ...], dict[str, float]] = {}

    @property
    def intact(self) -> bool:
        """True if parameters and buffers are those that were loaded, to the bit."""
        return self._loaded is None or digest(state(self._loaded.model)) == self.weights

    def load(self) -> LoadedModel:
        """The model, loaded by now. Raises `QsimError`."""
        if self._loaded is None:
            self._loaded = load(self.located, self.device, self.dtype)
            self.weights = digest(state(self._loaded.model))
        return self._loaded

    def measure(
        self,
        recipe: Recipe | Mapping[str, Any],
        data: str | None = None,
        *,
        calibration: Calibration | None = None,
        samples: Path | None = None,
        run: Run | None = None,
        on: Sequence[Hardware] = (),
        keep: bool = True,
        observer: SiteObserver | None = None,
        baseline: str | None = None,
        known: dict[int, Tensor] | None = None,
    ) -> Measured:
        """Measure the model under a recipe; `evaluate` explains the arguments, and `Simulation.audit` the observer.

        `known` has the numbers of batches that the same recipe has given for fewer samples, and gets the others. A
        recipe that draws random numbers does without: its draws depend on the forwards before.
        The model is as it was afterwards; with `keep=False` it stays under the recipe, and the bench is of no use any
        more. A recipe that quantizes nothing measures the model alone, once. Raises a `QsimError`.
        """
        run, start, given = run or Run(), time.perf_counter(), calibration or Calibration()
        job = self._job(recipe)
        alone = not job.recipe.quantizes and not job.recipe.transforms and baseline is None
        _check_samples(job.evaluator, samples)
        with run.stage(f"loading {self.located.name}"):
            beside = None if baseline is None else locate(baseline, self.host)
            dataset, seen = job.data(data, beside), job.calibration(given)
        before = _Pass({}) if baseline is None else self._other(baseline, job.evaluator, dataset, run)
        with run.stage(f"loading {self.located.name}"):
            loaded = self.load()
        example = job.evaluator.example(loaded, dataset)
        batches = job.batches(loaded, seen, given, run)
        with ExitStack() as stage:

            def measure_baseline() -> None:
                nonlocal before
                stage.close()
                if baseline is None:
                    before = self._own(job, loaded, dataset, run, run.store if samples is None else None)
                if batches is None:  # transforms show their progress
                    stage.enter_context(run.stage("quantizing weights"))

            stage.enter_context(run.stage("looking for matmuls"))
            try:
                simulation = simulate(
                    loaded.model,
                    job.recipe,
                    example=example,
                    calibration=batches,
                    structure=job.located.adapter.structure(loaded.model),
                    state=job.state(),
                    final=loaded.final,
                    keep=keep,
                    run=run,
                    meanwhile=measure_baseline,
                )
            except Exception:
                if example is not None:
                    _check_runs(job.evaluator, loaded, example)
                raise
        with simulation if keep else nullcontext():
            audit = simulation.audit(on=on, observer=observer)
            environment = Environment.here(self.device, self.dtype, loaded.model, simulation.sites.operations)
            draws = any(getattr(part, "draws", False) for part in components_in(job.recipe))
            reference = getattr(before.metrics, "outputs", None)
            compared = replace(run, reference=reference, known=None if draws else known)
            after = _Pass(before.metrics) if alone else _passed(job.evaluator, loaded, dataset, compared, "simulated")
        if samples is not None:
            _save_samples(job.evaluator, before.metrics, after.metrics, samples)
        result = Result(
            **description(job, loaded, dataset, self.host, on),
            **_compared(before, after),
            weights=self.weights,
            metric=job.evaluator.metric or next(iter(before.metrics)),
            alone=alone,
            audit=audit,
            environment=environment,
            data=data_record(data, dataset),
            calibration=None if seen is None else calibration_record(given, seen),
            transforms=simulation.reports,
            batch_size=run.batch_size,
            limit=run.limit,
            seed=run.seed,
            cached=[*(["baseline"] if before.cached else []), *simulation.cached],
        )
        result.warnings += [*job.notes(self.dtype), *simulation.warnings, *audit.warnings]
        result.seconds["total"] = time.perf_counter() - start
        return Measured(result, before.metrics, after.metrics)

    def _job(self, recipe: Recipe | Mapping[str, Any]) -> Job:
        """The recipe filled in for this model. Raises `RecipeError` if it names another one."""
        recipe = Recipe.of(recipe, self.host)
        if recipe.model is not None and locate(recipe.model, self.host).source != self.located.source:
            raise RecipeError(f"the recipe names the model {recipe.model!r}; this bench has {self.located.name}")
        return Job.at(self.located, recipe, self.host)

    def _other(self, name: str, evaluator: Evaluator, dataset: Data, run: Run) -> _Pass:
        """Measure another model as it is; it is in memory only meanwhile."""
        start = time.perf_counter()
        other = Bench(name, host=self.host, device=self.device, dtype=self.dtype)
        with run.stage(f"loading {other.located.name}"):
            loaded = other.load()
        found = _passed(evaluator, loaded, dataset, run, f"{self.dtype} baseline")
        return replace(found, of=other.located.name, seconds=time.perf_counter() - start)

    def _own(self, job: Job, loaded: LoadedModel, dataset: Data, run: Run, store: Store | None) -> _Pass:
        """Measure the model as it is, or give the metrics of an earlier run."""
        start = time.perf_counter()
        key = (str(job.evaluator), dataset.sha256, run.batch_size, run.limit, run.seed, run.allow_code_execution)
        cached = key in self._baselines
        if not cached:

            def evaluate() -> dict[str, float]:
                return _passed(job.evaluator, loaded, dataset, run, f"{self.dtype} baseline").metrics

            made_from = job, self.host, loaded, dataset, run, self.device, self.dtype
            self._baselines[key], cached = store.baseline(evaluate, *made_from) if store else (evaluate(), False)
        return _Pass(self._baselines[key], time.perf_counter() - start, cached=cached)


@dataclass(frozen=True)
class _Pass:
    """The metrics of one pass over the data."""

    metrics: dict[str, float]
    seconds: float = 0.0
    of: str | None = None
    """The name of another model that was measured; None: the model of the bench."""
    cached: bool = False
    """True if an earlier run had measured them."""


def _passed(evaluator: Evaluator, loaded: LoadedModel, data: Data, run: Run, label: str) -> _Pass:
    """Measure a model; progress is shown under a label."""
    start = time.perf_counter()
    shown = replace(run, track=lambda items, total, _: run.track(items, total, label))
    return _Pass(evaluator.measure(loaded, data, shown), time.perf_counter() - start)


def _compared(before: _Pass, after: _Pass) -> dict[str, Any]:
    """The parts of a result that come from the metrics of both passes."""
    return {
        "baseline": before.metrics,
        "baseline_of": before.of,
        "simulated": after.metrics,
        "intervals": intervals(before.metrics, after.metrics),
        "samples": after.metrics.size if isinstance(after.metrics, Metrics) else None,
        "warnings": [*without_score(before.metrics, "baseline"), *without_score(after.metrics, "simulated")],
        "seconds": {"baseline": before.seconds, "simulated": after.seconds},
    }


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
    baseline: str | None = None,
) -> Result:
    """Measure a model as it is and under a recipe; `samples` is a directory for what a person would look at.

    `baseline` names another model to compare with, in the place of this one as it is. `on` has hardware, for which the
    audit says what its batch costs under the recipe. A recipe that quantizes nothing measures the model alone.

    Raises a `QsimError` that says what to do.
    """
    host, run, start = host or installed(), run or Run(), time.perf_counter()
    recipe = Recipe.of(recipe, host)
    with run.stage(f"looking for {recipe.model or 'the default model'}"):
        bench = Bench(recipe.model, host=host, device=device, dtype=dtype)
    more: dict[str, Any] = {"on": on, "keep": False, "baseline": baseline}
    result = bench.measure(recipe, data, calibration=calibration, samples=samples, run=run, **more).result
    result.seconds["total"] = time.perf_counter() - start
    return result


def _check_runs(evaluator: Evaluator, loaded: LoadedModel, example: Any) -> None:
    """Raise `DataError` if the model as it is cannot run on the evaluator's example."""
    try:
        with as_in_evaluation(loaded.model):
            call(loaded.model, example)
    except Exception as error:  # models raise errors of any class
        raise DataError(
            f"the model, {type(loaded.model).__name__}, cannot run on the example of {evaluator}: {one_line(error)}"
        ) from error


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
