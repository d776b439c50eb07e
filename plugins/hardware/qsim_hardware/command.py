"""`qsim cost`: the command, its options, and the way from a model's name to a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsim_core.cli.options import COUNT, ON, PRODUCTS_ONLY, RECIPE, RESULT, Headed, output_file, with_options

if TYPE_CHECKING:
    from qsim_core import Recipe
    from qsim_core.components.host import Host
    from qsim_hardware.report import Report

SHAPES = (
    click.option("--batch", metavar="N", type=COUNT, default=1, help="Sequences or images computed together."),
    click.option("--prompt", metavar="N", type=COUNT, default=512, help="Tokens of each prompt."),
    click.option("--generate", metavar="N", type=click.IntRange(0, 2**31 - 1), default=128, help="Tokens after it."),
    click.option("--dtype", metavar="NAME", help="Of what is not quantized; default: the checkpoint's, or bfloat16."),
    ON,
    PRODUCTS_ONLY,
)

SAYING = ("plugins", "precision", "weights", "activations", "outputs", "kv_cache", "operations", "recipe")
"""The options that say what is quantized."""


@click.command(cls=Headed)
@with_options(RECIPE, "Recipe")
@with_options(SHAPES, "Shapes and hardware")
@with_options(RESULT)
def cost(json_file: str | None, quiet: bool, **options: Any) -> None:
    """Price a forward: time, bytes and energy.

    MODEL is a directory with a config.json, that file itself, a hub name, or the name of a model that a plugin brings.
    No weights are needed. Without a recipe the model is priced as it is.
    """
    from qsim_core.cli import progress
    from qsim_core.components.host import installed

    target = output_file(json_file)
    progress.hush_libraries()
    found = priced(options, installed())
    if target is not None:
        target.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if json_file == "-":
        click.echo(found.model_dump_json(indent=2))
    elif not quiet:
        from qsim_hardware.table import show

        show(found)


def priced(options: dict[str, Any], host: Host) -> Report:
    """The report of a command with these options. Raises a `QsimError`."""
    from qsim_core.cli.recipe_options import hardware_of
    from qsim_core.evaluation.job import DTYPES, check_machine
    from qsim_core.evaluation.locate import default_model, locate
    from qsim_hardware.phases import Shapes, notes, phases, with_factors
    from qsim_hardware.report import report

    if options["model"] is not None and Path(options["model"]).name == "config.json":
        options = {**options, "model": str(Path(options["model"]).parent)}
    hardware = hardware_of(options["on"], host)
    recipe = _recipe(options, host)
    located = locate(recipe.model or default_model(host), host)
    dtype = options["dtype"] or located.adapter.stored_dtype(located.source) or "bfloat16"
    check_machine("cpu", dtype)
    skip = located.adapter.skip if recipe.skip is None else recipe.skip
    applied = recipe.model_copy(update={"transforms": (), "skip": skip})
    shapes = Shapes(options["batch"], options["prompt"], options["generate"])
    model = located.adapter.outline(located.source, DTYPES[dtype])
    made = phases(model, applied, shapes, operations=not options["products_only"])
    found = [with_factors(phase, model, recipe.transforms) for phase in made]
    doubts = list(notes(model, shapes))
    if recipe.transforms:
        named = ", ".join(map(str, recipe.transforms))
        doubts.append(
            f"transforms change values and are left out, with what they add to a forward but factors beside weights: "
            f"{named}"
        )
    record = applied.record()
    return report(model, found, shapes, hardware, model=located.name, recipe=record, dtype=dtype, notes=doubts)


def _recipe(options: dict[str, Any], host: Host) -> Recipe:
    """The recipe that the options describe; without any of them, one that leaves all as it is."""
    from qsim_core import Recipe
    from qsim_core.cli.recipe_options import recipe_of

    said = any(options[key] for key in SAYING)
    return recipe_of(options, host) if said else Recipe.of({"model": options["model"]}, host)
