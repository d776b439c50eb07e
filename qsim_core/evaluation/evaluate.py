"""One run: the model as it is, then under the recipe, and the record of both."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from qsim_core.components.component import components_in
from qsim_core.components.host import Host, installed
from qsim_core.errors import DataError, QsimError, RecipeError, SpecError, did_you_mean
from qsim_core.evaluation import reuse
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.data import Calibration, Data
from qsim_core.evaluation.evaluator import Evaluator
from qsim_core.evaluation.fingerprint import of_component, of_machine, of_model, of_preparation, of_requirements
from qsim_core.evaluation.locate import Located, locate
from qsim_core.evaluation.metrics import intervals
from qsim_core.evaluation.result import CalibrationRecord, DataRecord, Environment, PluginRecord, Result
from qsim_core.evaluation.reuse import Reusable
from qsim_core.evaluation.trained import STATE, read_state
from qsim_core.simulation import store
from qsim_core.simulation.recipe import Recipe
from qsim_core.simulation.simulation import simulate
from qsim_core.transforms.run import Run

DEFAULT_MODEL = "opt-tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DISPATCHED = ("auto", "disk")
"""Devices that stand for a distribution of the weights by accelerate."""


@dataclass(frozen=True)
class Job:
    """A recipe with everything filled in, and what was found for it: ready to run."""

    recipe: Recipe
    located: Located
    evaluator: Evaluator
    trained_so: bool = False
    """Whether the model was trained under this recipe: then its directory has what the sites hold."""

    @classmethod
    def of(cls, recipe: Recipe, host: Host) -> Job:
        """Fill in model, evaluator and skipped sites from the adapter. Raises `ModelError` and `RecipeError`."""
        located = locate(DEFAULT_MODEL if recipe.model is None else recipe.model, host)
        adapter = located.adapter
        evaluator = cast("Evaluator | None", recipe.evaluate) or _evaluator(located, host)
        skip = adapter.skip if recipe.skip is None else recipe.skip
        filled = {**{key: getattr(recipe, key) for key in recipe.model_fields_set}, "model": located.name, "skip": skip}
        trained = located.trained
        if trained is not None and not recipe.quantizes and not recipe.transforms:
            filled |= trained.simulated(host)
        complete = Recipe.of({**filled, "evaluate": evaluator}, host)
        return cls(complete, located, evaluator, trained is not None and trained.fits(complete, host))

    def data(self, source: str | None) -> Data:
        """The data named by `source`, else the evaluator's own, else what goes with the model. Raises `DataError`."""
        if source is not None:
            return self.evaluator.read(source)
        trained = self.located.trained
        if trained is not None and trained.data is not None:
            return self.evaluator.read(trained.data)
        found = self.evaluator.default_data()
        if found is None and self.located.data is not None:
            found = self.located.data()
        if found is None:
            raise DataError(f"{self.located.name} comes without data; name some with --data")
        return found

    def state(self) -> dict[str, torch.Tensor] | None:
        """What the sites held at the end of the training, if the model was trained under this recipe."""
        return read_state(Path(self.located.source) / STATE) if self.trained_so else None

    def notes(self, dtype: str) -> list[str]:
        """What a reader must know about how the model was found, and is computed."""
        notes = self.located.notes(dtype)
        if self.located.trained is not None and not self.trained_so:
            notes.append(f"{self.located.name} was trained under another recipe; what its sites learned is left aside")
        return notes

    def calibration(self, given: Calibration) -> Data | None:
        """The data that the recipe's transforms look at, if it has any. Raises `DataError` if nothing is named."""
        if self.trained_so or (not self.recipe.transforms and not self.recipe.has_static):
            return None
        if given.source is not None:
            return self.evaluator.read(given.source, split="train")
        if self.located.calibration is not None:
            return self.located.calibration()
        found = self.evaluator.default_data()
        if found is None:
            who = self.recipe.transforms[0] if self.recipe.transforms else "a static scale"
            raise DataError(
                f"{who} needs calibration data, and {self.located.name} comes without; name some with "
                f"--calibration-data"
            )
        return found


def _evaluator(located: Located, host: Host) -> Evaluator:
    """The evaluator that goes with a named model, or its adapter's choice. Raises `RecipeError` if there is none."""
    text = located.evaluator or located.adapter.evaluator_of(located.source)
    if text is None:
        raise RecipeError(f"adapter {located.adapter} names no evaluator; say which with `evaluate:`")
    try:
        return host.parse(text, Evaluator)  # type: ignore[no-any-return]
    except SpecError as error:
        known = ", ".join(host.components(Evaluator)) or "none"
        raise RecipeError(
            f"{located.name} is evaluated by {text!r}, and no evaluator of that name is installed (there are: "
            f"{known}); install one, or say another with `evaluate:`"
        ) from error


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
) -> Result:
    """Measure a model as it is and under a recipe; `samples` is a directory for what a person would look at.

    Raises a `QsimError` that says what to do.
    """
    host, run, start = host or installed(), run or Run(), time.perf_counter()
    recipe = Recipe.of(recipe, host)
    with run.stage(f"looking for {recipe.model or DEFAULT_MODEL}"):
        job = Job.of(recipe, host)
    if not job.recipe.quantizes and not job.recipe.transforms:
        raise RecipeError("the recipe quantizes nothing; name weights, activations or outputs")
    _check_samples(job.evaluator, samples)
    if run.work_dir is not None:
        store.make(run.work_dir)
    with run.stage(f"loading {job.located.name}"):
        dataset = job.data(data)
        given = calibration or Calibration()
        seen = job.calibration(given)
        loaded = _load(job.located, device, dtype)
    example = job.evaluator.example(loaded, dataset)
    batches = None
    if seen is not None:
        batches = job.evaluator.calibration(loaded, seen, given.samples, given.length, run.seed)
    with run.stage("looking for matmuls"):
        if example is not None:  # a recipe that does not fit the model is told before the baseline has run for an hour
            simulate(loaded.model, job.recipe.model_copy(update={"transforms": ()}), example=example).restore()
    entry = None if samples is not None else _baseline_entry(job, host, loaded, dataset, run, device, dtype)
    baseline, baseline_seconds, cached = _baseline(entry, job.evaluator, loaded, dataset, run, dtype)
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
        audit = simulation.audit()
    compared = replace(run, reference=getattr(baseline, "outputs", None))
    simulated, simulated_seconds = _timed(job.evaluator, loaded, dataset, compared, "simulated")
    if samples is not None:
        _save_samples(job.evaluator, baseline, simulated, samples)
    seconds = {"baseline": baseline_seconds, "simulated": simulated_seconds, "total": time.perf_counter() - start}
    return Result(
        **_description(job, loaded, host),
        metric=job.evaluator.metric or next(iter(baseline)),
        baseline=baseline,
        simulated=simulated,
        intervals=intervals(baseline, simulated, run.seed),
        audit=audit,
        environment=Environment.here(device, dtype),
        data=DataRecord(name=dataset.name, sha256=dataset.sha256, source=from_anywhere(data)),
        calibration=None if seen is None else _calibration_record(given, seen),
        transforms=simulation.reports,
        warnings=[*job.notes(dtype), *simulation.warnings],
        batch_size=run.batch_size,
        limit=run.limit,
        seed=run.seed,
        seconds=seconds,
        cached=[*(["baseline"] if cached else []), *simulation.cached],
    )


def recipe_of(result: Result, host: Host) -> Recipe:
    """The recipe that a record was made with."""
    return Recipe.of({**result.recipe, "model": result.model, "evaluate": result.evaluator}, host)


def same_data(result: Result, rerun: Result) -> None:
    """Raise `DataError` if a record's data are not what they were."""
    if result.data.sha256 != rerun.data.sha256:
        raise DataError(
            f"the data {result.data.name!r} have changed since the record was made "
            f"({result.data.sha256[:12]} then, {rerun.data.sha256[:12]} now); the numbers do not compare"
        )


def _calibration_record(given: Calibration, seen: Data) -> CalibrationRecord:
    source = from_anywhere(given.source)
    return CalibrationRecord(
        name=seen.name, sha256=seen.sha256, source=source, samples=given.samples, length=given.length
    )


def from_anywhere(source: str | None) -> str | None:
    """A path that a record can be run again with from any directory; a name stays."""
    if source is None or not Path(source).expanduser().exists():
        return source
    return str(Path(source).expanduser().resolve())


def _check_samples(evaluator: Evaluator, directory: Path | None) -> None:
    """Tell before hours have gone by that there will be nothing to save, or nowhere to save it."""
    if directory is None:
        return
    if type(evaluator).save_samples is Evaluator.save_samples:
        raise DataError(f"{evaluator.name} makes no samples that could be saved")
    if directory.exists() and not directory.is_dir():
        raise DataError(f"cannot save samples in {directory}: it is no directory")


def _save_samples(evaluator: Evaluator, baseline: Any, simulated: Any, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        evaluator.save_samples(baseline.outputs, simulated.outputs, directory)
    except OSError as error:
        raise DataError(f"cannot save samples in {directory}: {error.strerror or error}") from None


def _load(located: Located, device: str, dtype: str) -> LoadedModel:
    if dtype not in DTYPES:
        raise QsimError(f"no dtype {dtype!r}{did_you_mean(dtype, DTYPES)}")
    if device in DISPATCHED:
        return located.adapter.load_dispatched(located.source, DTYPES[dtype], device)
    loaded = located.adapter.load(located.source, DTYPES[dtype])
    try:
        loaded.model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise QsimError(f"device {device!r} cannot be used: {' '.join(str(error).split())[:160]}") from None
    return loaded


def _timed(
    evaluator: Evaluator, loaded: LoadedModel, data: Data, run: Run, what: str
) -> tuple[dict[str, float], float]:
    start = time.perf_counter()
    labelled = replace(run, track=lambda items, total, text: run.track(items, total, what))
    return evaluator.evaluate(loaded, data, labelled), time.perf_counter() - start


def _baseline_entry(
    job: Job, host: Host, loaded: LoadedModel, data: Data, run: Run, device: str, dtype: str
) -> Reusable | None:
    """Where the baseline is kept, by all that decides it. None without a work directory, or where not all is known."""
    if run.work_dir is None:
        return None
    parts = [job.evaluator, *job.located.components]
    plugins = {plugin for part in parts for c in components_in(part) if (plugin := host.plugin_of(c)) is not None}
    options = (run.batch_size, run.limit, run.seed, run.allow_code_execution)
    made_from = itertools.chain(
        of_model(loaded.model),
        of_preparation(loaded.tokenizer),
        of_preparation(loaded.processor),
        *map(of_component, parts),
        (job.evaluator.protocol(loaded), data.sha256, *options),
        of_machine(device, dtype),
        of_requirements({"qsim-core", "transformers", *(plugin.distribution for plugin in plugins)}),
    )
    what = f"{job.evaluator}, {data.name}, {dtype}"
    with run.stage("looking for an earlier baseline"):
        return Reusable.of(run.work_dir, "baseline", made_from, model=job.located.name, what=what)


def _baseline(
    entry: Reusable | None, evaluator: Evaluator, loaded: LoadedModel, data: Data, run: Run, dtype: str
) -> tuple[dict[str, float], float, bool]:
    """The baseline's metrics, how long it took, and whether an earlier run had found them."""
    start = time.perf_counter()

    def evaluate() -> dict[str, float]:
        return _timed(evaluator, loaded, data, run, f"{dtype} baseline")[0]

    metrics, cached = (evaluate(), False) if entry is None else reuse.baseline(entry, run.seed, evaluate)
    return metrics, time.perf_counter() - start, cached


def _description(job: Job, loaded: LoadedModel, host: Host) -> dict[str, Any]:
    """The part of a record that says what was run."""
    return {
        "model": job.located.name,
        "adapter": str(job.located.adapter),
        "recipe": job.recipe.record(),
        "evaluator": str(job.evaluator),
        "protocol": job.evaluator.protocol(loaded),
        "plugins": _plugins(job, host),
    }


def _plugins(job: Job, host: Host) -> dict[str, PluginRecord]:
    parts: list[Any] = [job.recipe, *job.located.components]
    found = {host.plugin_of(component) for part in parts for component in components_in(part)}
    plugins = sorted((plugin for plugin in found if plugin is not None), key=lambda plugin: plugin.name)
    return {p.name: PluginRecord(distribution=p.distribution, version=p.version) for p in plugins}
