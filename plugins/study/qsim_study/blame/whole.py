"""`blame`: the prediction for all sites, and the runs that verify the first of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qsim_core import Bench, Calibration, CalibrationWarning, DataError, Recipe, RecipeError, Run, Simulation, simulate
from qsim_core.components.host import Host, installed
from qsim_core.evaluation.data import Data
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.record import data_record, description
from qsim_core.simulation.environment import Environment
from qsim_core.sites.site import Site
from qsim_study.blame.gradient import Prediction, predict, spread
from qsim_study.blame.parts import changes, unsplit
from qsim_study.blame.report import Blame, SiteBlame
from qsim_study.blame.verification import cost_of, measured_sites, tau

MANY = 3
"""Notes of one kind that are listed; the others are counted."""


def blame(
    recipe: Recipe | Mapping[str, Any],
    *,
    data: str | None = None,
    samples: int = 32,
    verify: int = 5,
    leave_one_out: bool = False,
    exhaustive: bool = False,
    metric: str | None = None,
    calibration: Calibration | None = None,
    run: Run | None = None,
    host: Host | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Blame:
    """Predict what each site of a recipe costs, and measure the first `verify` sites in its order.

    The prediction takes one gradient pass over so many `samples`, drawn evenly from the evaluation's. `exhaustive`
    measures every site. `leave_one_out` measures each of them in the whole recipe too. `metric` names the evaluator's
    metric of measured costs, of which less is better unless it is the main one. Under transforms only the whole recipe
    is measured. Raises a `QsimError`.
    """
    host, run, start = host or installed(), run or Run(), time.perf_counter()
    recipe = Recipe.of(recipe, host)
    bench = Bench(recipe.model, host=host, device=device, dtype=dtype)
    job = Job.at(bench.located, recipe, host)
    given, dataset = calibration or Calibration(), job.data(data)
    costs = predicted(bench, job, dataset, given, samples, run)
    answer = Blame(
        **description(job, bench.load(), dataset, host, ()),
        metric=metric or job.evaluator.metric,
        sites=costs.rows,
        labels=costs.labels,
        samples=costs.samples,
        limit=run.limit,
        seed=run.seed,
        data=data_record(data, dataset),
        environment=costs.environment,
        notes=costs.notes,
        seconds={"prediction": costs.seconds},
    )
    if verify or exhaustive:
        before = time.perf_counter()
        first = 0 if recipe.transforms else len(costs.rows) if exhaustive else verify
        answer = _verified(answer, first, leave_one_out, costs.sites, job, bench, data, given, run)
        answer.seconds["verification"] = time.perf_counter() - before
    answer.seconds["total"] = time.perf_counter() - start
    return answer


@dataclass(frozen=True)
class Predicted:
    """The prediction for a model under a recipe, and the circumstances in which it was made."""

    rows: list[SiteBlame]
    """The highest predicted cost first."""
    sites: list[Site]
    labels: int
    samples: int
    notes: list[str]
    environment: Environment
    seconds: float
    """The time of the gradient pass."""


def predicted(bench: Bench, job: Job, dataset: Data, given: Calibration, samples: int, run: Run) -> Predicted:
    """Predict what each site costs, from so many samples of a data set. Raises a `QsimError`."""
    _check(job)
    with run.stage(f"loading {job.located.name}"):
        loaded = bench.load()
        chosen = spread(job.evaluator.training(loaded, dataset, None), samples, run.limit)
    with _simulated(job, bench, dataset, given, run) as simulation:
        before = time.perf_counter()
        prediction = predict(simulation, chosen, run)
        seconds = time.perf_counter() - before
        sites = [site for site in simulation.sites.table.values() if changes(site)]
        notes = [*job.notes(bench.dtype), *simulation.warnings]
        notes += _short(line for site in sites for line in unsplit(site))
        notes += _of_transforms(simulation)
        rows = [_row(site, prediction) for site in sites if site.name in prediction.sums]
        environment = Environment.here(bench.device, bench.dtype, simulation.model)
    rows.sort(key=lambda row: -row.predicted)
    notes += [f"{site.name}: no gradient reaches it" for site in sites if site.name not in prediction.sums]
    return Predicted(rows, sites, prediction.labels, len(chosen), notes, environment, seconds)


def _check(job: Job) -> None:
    """Raise `RecipeError` for a recipe whose cost does not come from its sites."""
    recipe = job.recipe
    if not recipe.quantizes:
        raise RecipeError("the recipe quantizes nothing; name weights, activations or outputs")
    if recipe.operations:
        raise RecipeError("blame tells what the sites of matmuls cost; leave operations out")
    if recipe.learns or (job.as_stored and job.located.trained is not None):
        raise RecipeError("blame cannot tell what trained scales cost; name a recipe without them")


@contextmanager
def _simulated(job: Job, bench: Bench, dataset: Data, given: Calibration, run: Run) -> Iterator[Simulation]:
    """The model under the recipe, with static scales as an evaluation has them."""
    loaded = bench.load()
    batches = job.batches(loaded, job.calibration(given), given, run)
    example = job.evaluator.example(loaded, dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # they are among the notes
        simulation = simulate(
            loaded.model,
            job.recipe,
            example=example,
            calibration=batches,
            structure=job.located.adapter.structure(loaded.model),
            final=loaded.final,
            run=run,
        )
    with simulation:
        yield simulation


def _of_transforms(simulation: Simulation) -> Iterator[str]:
    """Lines that say what costs are compared with, if that is not the model as it was loaded."""
    if simulation.recipe.transforms:
        yield "costs are those of rounding the transformed model; single sites are not measured under transforms"
    if pinned := simulation.sites.weights.pinned:
        yield f"weights that lie on their grids already count as exact: {len(pinned)}, like {min(pinned)}"


def _row(site: Site, prediction: Prediction) -> SiteBlame:
    parts = prediction.parts(site.name)
    roles = (role for role in ("input", "input2", "weight", "output") if role != "input2" or site.weight is None)
    standing = {site.named(role): site.standing(role) for role in roles}
    return SiteBlame(
        site=site.name,
        roles={role: str(quantizer) for role, quantizer in standing.items() if quantizer is not None},
        arithmetic=str(site.plan.arithmetic),
        predicted=sum(parts.values()),
        error=prediction.noise(site.name),
        parts=parts,
        fisher=prediction.fisher(site.name),
    )


def _verified(
    answer: Blame,
    first: int,
    leave_one_out: bool,
    sites: Sequence[Site],
    job: Job,
    bench: Bench,
    data: str | None,
    given: Calibration,
    run: Run,
) -> Blame:
    """The answer with the measured costs of its first sites, and how well the prediction has ranked them."""
    quiet = Run(run.batch_size, run.limit, run.seed)
    with run.stage("measuring the whole recipe"):
        whole = bench.measure(job.recipe, data, calibration=given, run=quiet)
    metric = answer.metric or whole.result.metric
    if metric not in whole.simulated:
        raise DataError(f"the evaluator has no metric {metric!r}; there are: {', '.join(whole.simulated)}")
    rows, better = answer.sites[:first], job.evaluator.higher_is_better and metric == whole.result.metric

    def measure(recipe: Recipe) -> Any:
        return bench.measure(recipe, data, calibration=given, run=quiet)

    runs = measured_sites(rows, sites, job.recipe, whole, metric, measure, leave_one_out, better)
    measured = list(run.track(runs, len(rows), "single sites"))
    return answer.model_copy(
        update={
            "metric": metric,
            "sites": [*measured, *answer.sites[first:]],
            "whole": cost_of(whole.baseline, whole.simulated, metric, better),
            "tau": tau((row.predicted, row.alone) for row in measured),
            "tau_left_out": tau((row.predicted, row.left_out) for row in measured),
            "tau_fisher": tau((row.fisher, row.alone) for row in measured),
        }
    )


def _short(lines: Iterator[str]) -> list[str]:
    """The lines, each once; many are counted."""
    found = list(dict.fromkeys(lines))
    return found if len(found) <= MANY else [*found[:MANY], f"{len(found) - MANY} more quantizers like these"]
