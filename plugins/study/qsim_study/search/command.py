"""`qsim search`: the command and its options."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsim_core.cli.evaluate import KEPT, SHOWN_WARNINGS
from qsim_core.cli.options import (
    CALIBRATION,
    COMPUTATION,
    DATA,
    ON,
    POSITIVE,
    PRODUCTS_ONLY,
    RECIPE,
    RESULT,
    Headed,
    output_file,
    with_options,
)
from qsim_core.errors import CalibrationWarning

if TYPE_CHECKING:
    from qsim_core.components.host import Host
    from qsim_study.search.found import Found

BUDGET = (
    click.option("--bits", metavar="N", type=POSITIVE, help="Mean bits of the quantized weights, scales counted."),
    click.option("--bytes", metavar="N", type=POSITIVE, help="Bytes of the quantized weights, scales counted."),
    click.option("--bops", metavar="N", type=POSITIVE, help="Bit operations of a forward of the evaluator's example."),
    click.option("--ms", metavar="N", type=POSITIVE, help="Milliseconds of the same forward on the hardware of --on."),
    ON,
    PRODUCTS_ONLY,
)
SEARCH = (
    click.option(
        "--rounds",
        metavar="N",
        type=click.IntRange(0, 100),
        default=2,
        help="Measure sensitivities so often again, around the best allotment.",
    ),
    click.option(
        "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the recipe as YAML, for --recipe."
    ),
    *RESULT,
)
CHOICES = {
    "weights": "Quantizers of weights to choose from, like 'int3,int4,block(int4, n=64)'.",
    "activations": "Quantizers of inputs of matmuls to choose from, in the same way.",
}


@click.command(cls=Headed)
@with_options(RECIPE, "Recipe")
@with_options(BUDGET, "Budget")
@with_options((*DATA, *CALIBRATION), "Data")
@with_options((*COMPUTATION, *KEPT), "Computation")
@with_options(SEARCH)
def search(json_file: str | None, quiet: bool, **options: Any) -> None:
    """Allot number formats by site under a budget.

    --weights and --activations take several, with commas between. Weights that read the same input share a choice, like
    q, k and v. Losses are measured on calibration data. The recipe that is found is then evaluated beside uniform ones.
    """
    from qsim_core.cli import progress

    with nullcontext() if quiet else progress.stage("starting"):  # torch takes seconds to load
        from qsim_core.components.host import installed
        from qsim_core.files import writing
        from qsim_study.search.table import show

    target, recipe_file = output_file(json_file), output_file(options["output"])
    found = _found(options, installed(), quiet)
    if recipe_file is not None:
        with writing(recipe_file) as file:
            file.write(found.recipe.encode())
    if target is not None:
        found.write(target)
    if json_file == "-":
        click.echo(found.model_dump_json(indent=2))
    elif not quiet:
        show(found)
    for line in found.warnings[:SHOWN_WARNINGS]:
        click.echo(f"Warning: {line}", err=True)


for parameter in search.params:
    if isinstance(parameter, click.Option) and parameter.name in CHOICES:
        parameter.metavar, parameter.help = "TEXT,…", CHOICES[parameter.name]


def _found(options: dict[str, Any], host: Host, quiet: bool) -> Found:
    """Search with the command's options."""
    from qsim_core.cli import progress
    from qsim_core.cli.recipe_options import calibration_of, hardware_of, recipe_of, run_of
    from qsim_study.lists import split
    from qsim_study.search.choices import KEYS
    from qsim_study.search.found import Budget
    from qsim_study.search.searching import search as allot

    progress.hush_libraries()
    warnings.simplefilter("ignore", CalibrationWarning)  # the result has them
    several = {key: split(options[key]) for key in KEYS if options[key] is not None}
    options = {**options, **{key: found[0] for key, found in several.items()}}
    offered = {
        key: [getattr(recipe_of({**options, key: text}, host), key) for text in found] for key, found in several.items()
    }
    return allot(
        budget=Budget(**{name: options[name] for name in Budget.model_fields}),
        weights=offered.get("weights", ()),
        activations=offered.get("activations", ()),
        recipe=recipe_of(options, host),
        host=host,
        data=options["data"],
        device=options["device"],
        dtype=options["dtype"],
        calibration=calibration_of(options),
        run=run_of(options, quiet),
        on=hardware_of(options["on"], host, options["products_only"]),
        rounds=options["rounds"],
    )
