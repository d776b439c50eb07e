"""`qsim blame`: the command and its options."""

from __future__ import annotations

from typing import Any

import click

from qsim_core.cli.options import (
    CALIBRATION,
    COMPUTATION,
    COUNT,
    DATA,
    RECIPE,
    RESULT,
    Headed,
    output_file,
    with_options,
)

LOOKING = (
    click.option("--samples", metavar="N", type=COUNT, default=32, help="Samples of the gradient pass."),
    click.option(
        "--verify",
        metavar="N",
        type=click.IntRange(0, 2**31 - 1),
        default=5,
        help="Measure so many of the sites that are predicted to cost most, each alone.",
    ),
    click.option("--leave-one-out", is_flag=True, help="Measure the whole recipe without each of them too."),
    click.option("--exhaustive", is_flag=True, help="Measure every site."),
    click.option("--metric", metavar="NAME", help="The metric of measured costs, like nll; the evaluator's main one."),
)


@click.command(cls=Headed)
@with_options(RECIPE, "Recipe")
@with_options(LOOKING, "Prediction and verification")
@with_options((*DATA, *CALIBRATION), "Data")
@with_options(COMPUTATION, "Computation")
@with_options(RESULT)
def blame(json_file: str | None, quiet: bool, **options: Any) -> None:
    """Tell which sites of MODEL cost the metric.

    One gradient pass predicts what each matmul costs, and at it the element, the scale, clipping and the arithmetic.
    Runs of single sites verify the first of them.
    """
    from qsim_core.cli import progress
    from qsim_core.cli.recipe_options import calibration_of, recipe_of, run_of
    from qsim_core.components.host import installed
    from qsim_study.blame.table import show
    from qsim_study.blame.whole import blame as run_blame

    target, host = output_file(json_file), installed()
    progress.hush_libraries()
    found = run_blame(
        recipe_of(options, host),
        data=options["data"],
        samples=options["samples"],
        verify=options["verify"],
        leave_one_out=options["leave_one_out"],
        exhaustive=options["exhaustive"],
        metric=options["metric"],
        calibration=calibration_of(options),
        host=host,
        device=options["device"],
        dtype=options["dtype"],
        run=run_of(options, quiet),
    )
    if target is not None:
        target.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if json_file == "-":
        click.echo(found.model_dump_json(indent=2))
    elif not quiet:
        show(found)
