"""`qsim evaluate`: measure a model as it is and under a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsim_core.cli.options import (
    CALIBRATION,
    COMPUTATION,
    DATA,
    ON,
    PRODUCTS_ONLY,
    RECIPE,
    RESULT,
    Headed,
    output_file,
    with_options,
)
from qsim_core.errors import CalibrationWarning, RecipeError

if TYPE_CHECKING:
    from qsim_core.components.host import Host
    from qsim_core.evaluation.result import Result
    from qsim_core.simulation.recipe import Recipe

SHOWN_WARNINGS = 4
"""Warnings that are printed; the others are counted."""
FREE_BESIDE_A_RECORD = frozenset({"record", "device", "dry_run", "work_dir", "samples", "allow_code_execution"})
"""The options that a record does not decide. `--allow-code-execution` is one: a record allows nothing."""


BASELINE = click.option(
    "--baseline", metavar="MODEL", help="Compare with this model; default: MODEL as it is, with no quantizer."
)
RECORD = click.option(
    "--from", "record", type=click.Path(path_type=Path), metavar="FILE", help="Run a result's record again."
)
KEPT = (
    click.option(
        "--work-dir", type=click.Path(path_type=Path), metavar="DIR", help="Keep there what other runs can use."
    ),
    click.option("--allow-code-execution", is_flag=True, help="Let an evaluator run programs that the model writes."),
)
"""Options of evaluations that take long, or run programs."""
OUTPUT = (
    click.option("--dry-run", is_flag=True, help="Print the recipe that would run, and stop."),
    click.option(
        "--save-samples",
        "samples",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Write what there is to look at.",
    ),
    ON,
    PRODUCTS_ONLY,
    *RESULT,
)


@click.command(cls=Headed)
@with_options((*RECIPE, RECORD, BASELINE), "Recipe")
@with_options((*DATA, *CALIBRATION), "Data")
@with_options((*COMPUTATION, *KEPT), "Computation")
@with_options(OUTPUT)
@click.pass_context
def evaluate(ctx: click.Context, /, json_file: str | None, quiet: bool, **options: Any) -> None:
    """Measure MODEL as it is and in another precision; without a recipe, as it is.

    MODEL is a directory, a hub name, or the name of a model that a plugin brings. Default: the model that an installed
    plugin declares as the default.
    """
    from qsim_core.cli import progress

    with nullcontext() if quiet else progress.stage("starting"):  # torch takes seconds to load
        from qsim_core.cli.result_table import show
        from qsim_core.components.host import installed

    target = output_file(json_file)
    host = installed()
    given = {name for name in options if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    before = _record(options, given)
    if before is not None:
        host = host.naming(before.plugins)
    recipe, options = _job(options, given, before, host)
    if options["dry_run"]:
        _print_recipe(recipe, options, host)
        return
    result = _measured(recipe, options, before, host, quiet)
    if target is not None:
        result.write(target)
    if json_file == "-":
        click.echo(result.model_dump_json(indent=2))
    elif not quiet:
        show(result)


def _record(options: dict[str, Any], given: set[str]) -> Result | None:
    """The record that --from names. Raises `RecipeError` for options that say it differently."""
    from qsim_core.evaluation.result import Result

    if options["record"] is None:
        return None
    if clash := given - FREE_BESIDE_A_RECORD:
        raise RecipeError(f"--from runs a record as it is; leave {', '.join(sorted(clash))} out")
    return Result.read(options["record"])


def _job(options: dict[str, Any], given: set[str], before: Result | None, host: Host) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the options under which it runs: those of the record, if there is one."""
    from qsim_core.cli.recipe_options import recipe_of
    from qsim_core.evaluation.record import recipe_of as recipe_of_record

    if before is None:
        return recipe_of(options, host, alone=True), options
    device = {"device": options["device"]} if "device" in given else {}
    return recipe_of_record(before, host), options | _recorded(before) | device


def _recorded(before: Result) -> dict[str, Any]:
    """The options that the record was made with."""
    options = {
        "data": before.data.source,
        "limit": before.limit,
        "batch_size": before.batch_size,
        "seed": before.seed,
        "dtype": before.environment.dtype,
        "device": before.environment.device,
        "on": tuple(before.audit.costs),
        "baseline": before.baseline_of,
    }
    if (looked_at := before.calibration) is not None:
        options["calibration_data"] = looked_at.source
        options["calibration_samples"], options["calibration_seqlen"] = looked_at.samples, looked_at.length
        options["calibration_seed"] = looked_at.seed
    return options


def _print_recipe(recipe: Recipe, options: dict[str, Any], host: Host) -> None:
    """Print the recipe with everything that the model's adapter fills in, if machine, hardware and data are there."""
    from qsim_core.cli.recipe_options import hardware_of
    from qsim_core.evaluation.data import check_source
    from qsim_core.evaluation.job import Job, check_machine

    job = Job.of(recipe, host)
    check_machine(options["device"], options["dtype"])
    hardware_of(options["on"], host, options["products_only"])
    for source in (options["data"], options["calibration_data"]):
        if source is not None:
            check_source(source)
    click.echo(job.recipe.to_yaml(), nl=False)


def _measured(recipe: Recipe, options: dict[str, Any], before: Result | None, host: Host, quiet: bool) -> Result:
    """Run the evaluation and print its warnings."""
    from qsim_core.cli import progress
    from qsim_core.cli.recipe_options import calibration_of, hardware_of, notes_of, run_of
    from qsim_core.evaluation.bench import evaluate as run_evaluation
    from qsim_core.evaluation.record import same_data

    progress.hush_libraries()
    notes = [] if before is not None else notes_of(options, recipe, host)
    warnings.simplefilter("ignore", CalibrationWarning)  # the result has them, and they are printed below
    result = run_evaluation(
        recipe,
        host=host,
        data=options["data"],
        device=options["device"],
        dtype=options["dtype"],
        calibration=calibration_of(options),
        samples=options["samples"],
        on=hardware_of(options["on"], host, options["products_only"]),
        baseline=options["baseline"],
        run=run_of(options, quiet),
    )
    result.warnings[:0] = notes
    if before is not None:
        same_data(before, result)
        for line in _differences(before, result):
            click.echo(f"Warning: {line}", err=True)
    for line in result.warnings[:SHOWN_WARNINGS]:
        click.echo(f"Warning: {line}", err=True)
    if len(result.warnings) > SHOWN_WARNINGS:
        click.echo(f"Warning: {len(result.warnings) - SHOWN_WARNINGS} more like these (--json has them)", err=True)
    return result


def _differences(before: Result, after: Result) -> Iterator[str]:
    """The differences between this run's plugins, libraries and machine and those of the record."""
    same_dtype = before.environment.dtype == after.environment.dtype
    if before.weights and same_dtype and before.weights != after.weights:
        digests = f"{before.weights[:12]} then, {after.weights[:12]} now"
        yield f"the weights of {before.model} have changed since the record was made ({digests})"
    for name, plugin in before.plugins.items():
        now = after.plugins.get(name)
        if now != plugin:
            found = now.version if now else "not used"
            yield f"plugin {name!r} was {plugin.distribution} {plugin.version}, now {found}"
    for name, plugin in after.plugins.items():
        if name not in before.plugins:
            yield f"plugin {name!r} ({plugin.distribution} {plugin.version}) had no part in the record"
    for library, version in before.environment.versions.items():
        if after.environment.versions.get(library) != version:
            yield f"{library} was {version}, now {after.environment.versions.get(library)}"
    for what in ("device", "threads"):
        was, now = getattr(before.environment, what), getattr(after.environment, what)
        if was != now:
            yield f"{what} was {was}, now {now}: sums may be taken in another order"
