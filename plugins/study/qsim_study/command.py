"""`qsim study`: the command and its options."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsim_core.cli.options import (
    CALIBRATION,
    COMPUTATION,
    COUNT,
    DATA,
    FILE,
    ON,
    RECIPE,
    RESULT,
    Headed,
    output_file,
    with_options,
)

if TYPE_CHECKING:
    from qsim_core.components.host import Host
    from qsim_study.executors import Executor
    from qsim_study.specification import Specification

VARIED = (
    click.option(
        "--vary",
        multiple=True,
        metavar="KEY=VALUE,…",
        help="Try each value of a key: weights=int4,e2m1, abfp.n=16,32, model=…; repeatable.",
    ),
)
LOOKED_AT = (
    click.option(
        "--histograms", multiple=True, metavar="SITE", help="Count the values at sites, like *.fc2, for the report."
    ),
    click.option(
        "--blame",
        metavar="N",
        type=click.IntRange(0, 2**31 - 1),
        help="Predict the cost of each site from N samples, for the report.",
    ),
    click.option("--until-decided", is_flag=True, help="Double the samples of cells until each comparison is decided."),
    click.option("--difference", metavar="PERCENT", help="The smallest difference of a ratio that matters, like 0.5%."),
)
WHERE = (
    click.option("--workers", metavar="N", type=COUNT, help="Processes of this machine."),
    click.option("--dask", metavar="ADDRESS|local", help="A Dask cluster: tcp://…, or `local`."),
    click.option("--slurm", metavar="N", type=COUNT, help="Jobs of Slurm, by submitit; the output has to be shared."),
)
OUTPUT = (
    click.option("--output", "-o", type=click.Path(path_type=Path), metavar="DIR", help="The folder of results."),
    click.option("--dry-run", is_flag=True, help="List the cells, and stop."),
    click.option("--yes", is_flag=True, help="Allow more than 10,000 cells."),
    click.option("--csv", "csv_file", type=FILE, metavar="FILE", help="Write the rows as CSV."),
    click.option("--parquet", "parquet_file", type=FILE, metavar="FILE", help="Write the rows as Parquet."),
    click.option("--report/--no-report", default=True, help="Write DIR/report.html, a page for a browser."),
    click.option(
        "--plots", type=click.Path(path_type=Path), metavar="DIR", help="Write pictures as SVG and PNG, by matplotlib."
    ),
    *RESULT,
)
REPORT = "report.html"


@click.command(cls=Headed)
@with_options(RECIPE, "Recipe of all cells")
@with_options((*VARIED, ON), "Cells")
@with_options((*DATA, *CALIBRATION, *LOOKED_AT), "Data")
@with_options((*COMPUTATION, *WHERE), "Computation")
@with_options(OUTPUT)
@click.pass_context
def study(ctx: click.Context, /, json_file: str | None, quiet: bool, **options: Any) -> None:
    """Measure many recipes, and compare them.

    MODEL is a model as in `qsim evaluate`, or a study file in YAML. What a study has computed stays in its folder, and
    a study that was interrupted goes on.
    """
    from qsim_core.cli import progress
    from qsim_core.components.host import installed
    from qsim_core.transforms.run import Run
    from qsim_study.report import check_plots, write_plots, write_report
    from qsim_study.study_run import study as run_study
    from qsim_study.table import show, write_csv, write_parquet

    files = [output_file(name) for name in (json_file, options["csv_file"], options["parquet_file"])]
    host = installed()
    given = {name for name in options if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    specification = specification_of(options, given, host)
    if options["dry_run"]:
        _list(specification, host, options["yes"], json_file)
        return
    if options["output"] is None:
        raise click.UsageError("say where results go: --output DIR")
    if options["plots"] is not None:
        check_plots()
    progress.hush_libraries()
    found = run_study(
        specification,
        options["output"],
        executor=executor_of(options),
        host=host,
        run=Run(**({} if quiet else progress.SHOWN)),
        many=options["yes"],
        until_decided=options["until_decided"],
        difference=_difference(options["difference"]),
    )
    compared = [asdict(one) for one in found.comparisons]
    text = json.dumps({"rows": found.rows, "comparisons": compared, "notes": found.notes}, indent=2)
    if files[0] is not None:
        files[0].write_text(text + "\n", encoding="utf-8")
    if files[1] is not None:
        write_csv(found.rows, files[1])
    if files[2] is not None:
        write_parquet(found.rows, files[2])
    said = list(found.notes)
    if options["report"]:
        write_report(found, path := options["output"] / REPORT)
        said.append(f"the report: {path}")
    if options["plots"] is not None:
        write_plots(found, options["plots"])
    if json_file == "-":
        click.echo(text)
    elif not quiet:
        show(found.rows, said)
    if all("failure" in row for row in found.rows):
        ctx.exit(1)


def specification_of(options: dict[str, Any], given: set[str], host: Host) -> Specification:
    """The study that a file and options describe; an option says it for all cells. Raises a `QsimError`."""
    from qsim_core.cli.recipe_options import ROLES, values_of
    from qsim_core.errors import RecipeError
    from qsim_core.simulation.recipe import read_yaml
    from qsim_study.cell import Circumstances
    from qsim_study.lists import split
    from qsim_study.specification import Specification

    values: dict[str, Any] = {}
    if options["model"] is not None and options["model"].endswith((".yaml", ".yml")):
        values = Specification.read(Path(options["model"])).said()
        options = options | {"model": None}
    for text in options["vary"]:
        key, equals, choices = text.partition("=")
        if not (key.strip() and equals and choices.strip()):
            raise RecipeError(f"--vary is written KEY=VALUE,VALUE, like abfp.n=16,32, not {text!r}")
        parts = [read_yaml(part, "--vary") if part.startswith("[") else part for part in split(choices)]
        values.setdefault("vary", {})[key.strip()] = parts
    said = values_of({**options, "model": None}) | {key: options[key] for key in ROLES if options[key] is not None}
    short = {"plugin": "plugins", "precision": "precision", "static": "static", "set": "settings"}
    said |= {key: options[option] for key, option in short.items() if options[option]}
    if options["model"] is not None:
        values["models"] = [options["model"]]
    values["recipe"] = values.get("recipe", {}) | said
    inside = {key: options[key] for key in Circumstances.model_fields if key in given}
    return Specification.of(values | inside)


def executor_of(options: dict[str, Any]) -> Executor:
    """The way to compute that the options name; one process if they name none."""
    from qsim_study.executors import Dask, InProcess, Processes, Slurm

    named = [name for name in ("dask", "slurm") if options[name] is not None]
    if len(named) + (options["workers"] is not None and "slurm" in named) > 1:
        raise click.UsageError("name one of --workers, --dask and --slurm")
    if options["dask"] is not None:
        local = options["dask"] == "local"
        return Dask(None if local else options["dask"], options["workers"])
    if options["slurm"] is not None:
        return Slurm(options["slurm"])
    return InProcess() if options["workers"] is None else Processes(options["workers"])


def _difference(text: str | None) -> float | None:
    """A share: 0.5% or 0.005. Raises a usage error for anything else."""
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise click.UsageError(f"--difference is a share like 0.5%, not {text!r}")
    return share


def _list(specification: Specification, host: Host, yes: bool, json_file: str | None) -> None:
    """Print the cells that would be computed."""
    from qsim_core.cli.console import console

    cells = specification.cells(host, yes)
    if json_file == "-":
        click.echo(json.dumps([cell.model_dump(mode="json") for cell in cells], indent=2))
        return
    out = console(soft_wrap=True)
    for cell in cells:
        out.print(cell.label or "the recipe alone")
    out.print(f"{len(cells)} cells", style="dim")
