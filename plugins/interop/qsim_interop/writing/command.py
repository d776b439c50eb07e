"""`qsim export`: the command and its options."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsim_core.cli.options import CALIBRATION, FILE, RECIPE, SEED, Headed, with_options
from qsim_core.errors import CalibrationWarning

if TYPE_CHECKING:
    from qsim_core.evaluation.adapter import LoadedModel
    from qsim_core.evaluation.job import Job
    from qsim_core.simulation.simulation import Simulation
    from qsim_core.transforms.run import Run

SHOWN_WARNINGS = 4
"""Warnings that are printed; the others are counted."""
DATA = (
    click.option(
        "--data",
        type=FILE,
        metavar="FILE|NAME",
        help="Data of which one sample is looked at; default: the model's own.",
    ),
    click.option("--seed", metavar="N", type=SEED, default=0, help="Seed of drawn samples."),
)
OUTPUT = (
    click.option("--to", metavar="FORMAT", required=True, help="compressed-tensors, gguf, onnx or torchao."),
    click.option(
        "--output", type=click.Path(path_type=Path), metavar="DIR", required=True, help="An empty or new directory."
    ),
    click.option("--device", default="cpu", help="Where transforms compute: cpu, cuda, …"),
    click.option("--quiet", "-q", is_flag=True, help="No progress."),
)


@click.command(cls=Headed)
@with_options(RECIPE, "Recipe")
@with_options((*DATA, *CALIBRATION), "Data")
@with_options(OUTPUT)
def export(to: str, output: Path, quiet: bool, **options: Any) -> None:
    """Write MODEL under a recipe in a format that other programs run.

    Transforms come first. Codes and scales are those of the simulation, bit for bit; what the format cannot hold
    exactly is an error.
    """
    from qsim_core.cli import progress

    with nullcontext() if quiet else progress.stage("starting"):  # torch takes seconds to load
        from qsim_core.transforms.run import Run
        from qsim_interop.writing.export import check_empty, format_of
        from qsim_interop.writing.export import export as write

    format_of(to)
    check_empty(output)
    progress.hush_libraries()
    warnings.simplefilter("ignore", CalibrationWarning)  # they are printed below
    run = Run(seed=options["seed"], **({} if quiet else progress.SHOWN))
    loaded, simulation = _simulated(options, run)
    with run.stage(f"writing {output}"):
        notes = write(simulation, loaded, to, output)
    for line in simulation.warnings[:SHOWN_WARNINGS]:
        click.echo(f"Warning: {line}", err=True)
    if len(simulation.warnings) > SHOWN_WARNINGS:
        click.echo(f"Warning: {len(simulation.warnings) - SHOWN_WARNINGS} more like these", err=True)
    for line in notes:
        click.echo(f"Note: {line}", err=True)
    click.echo(f"{output} holds the model in the format {to}")


def _simulated(options: dict[str, Any], run: Run) -> tuple[LoadedModel, Simulation]:
    """Load the model, and simulate it under the recipe of the options."""
    from qsim_core.cli.recipe_options import calibration_of, recipe_of
    from qsim_core.components.host import installed
    from qsim_core.evaluation.job import Job, check_machine, load
    from qsim_core.simulation.simulation import simulate

    host = installed()
    check_machine(options["device"], "float32")
    job = Job.of(recipe_of(options, host, alone=True), host)
    given = calibration_of(options)
    with run.stage(f"loading {job.located.name}"):
        seen = job.calibration(given)
        loaded = load(job.located, options["device"], "float32")
    return loaded, simulate(
        loaded.model,
        job.recipe,
        example=_example(job, loaded, options["data"]),
        calibration=job.batches(loaded, seen, given, run),
        structure=job.located.adapter.structure(loaded.model),
        state=job.state(),
        final=loaded.final,
        run=run,
    )


def _example(job: Job, loaded: LoadedModel, data: str | None) -> Any:
    """One batch of the data; without any data, the example that a model of transformers brings. Raises `DataError`."""
    from qsim_core.errors import DataError

    try:
        return job.evaluator.example(loaded, job.data(data))
    except DataError:
        brought = getattr(loaded.model, "dummy_inputs", None)
        if data is not None or not isinstance(brought, dict):
            raise
        return {name: tensor.to(loaded.model.device) for name, tensor in brought.items()}
