"""`qsim finetune`: the command and its options."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsim_core.cli.options import (
    CALIBRATION,
    COUNT,
    FILE,
    LENGTH,
    POSITIVE,
    RECIPE,
    RESULT,
    SEED,
    Headed,
    output_file,
    with_options,
)
from qsim_core.errors import CalibrationWarning

if TYPE_CHECKING:
    from qsim_finetune.training import Finetuned


DATA = (
    click.option(
        "--data", type=FILE, metavar="FILE|NAME", help="Data to train on; default: the train split of the model's own."
    ),
    click.option(
        "--eval-data",
        type=FILE,
        metavar="FILE|NAME",
        help="Data to measure on; default: the model's own, or a test split.",
    ),
    click.option(
        "--valid-data", type=FILE, metavar="FILE|NAME", help="Held-out data, on which several --lr are compared."
    ),
    click.option("--limit", metavar="N", type=COUNT, help="Measure on so many samples only."),
)
TRAINING = (
    click.option("--steps", metavar="N", type=COUNT, help="Optimizer steps; default: as many as the epochs have."),
    click.option("--epochs", metavar="X", type=POSITIVE, default=1.0, help="Passes over the data."),
    click.option("--batch-size", metavar="N", type=COUNT, default=8, help="Samples at a time."),
    click.option("--accumulate", metavar="N", type=COUNT, default=1, help="Batches in one step."),
    click.option(
        "--lr",
        "rates",
        metavar="X",
        type=POSITIVE,
        multiple=True,
        default=[1e-4],
        help="Highest learning rate; of several, the best on --valid-data after a trial of each.",
    ),
    click.option("--seqlen", metavar="N", type=LENGTH, help="Tokens of a sample; default: what the evaluator takes."),
    click.option("--seed", metavar="N", type=SEED, default=0, help="Seed of the order of samples and of dropout."),
    click.option("--distill", is_flag=True, help="Learn the float32 model's outputs instead of the data's labels."),
    click.option(
        "--hidden",
        metavar="X",
        type=click.FloatRange(0),
        default=0.0,
        help="With --distill, weight of the hidden states' error.",
    ),
    click.option(
        "--damping",
        metavar="X",
        type=click.FloatRange(0),
        default=0.0,
        help="Weight of the weights' squared distance from the values that they are rounded to.",
    ),
    click.option("--control", is_flag=True, help="Train in float32 and round afterwards: what training alone does."),
)
COMPUTATION = (
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to compute."),
    click.option("--gradient-checkpointing", is_flag=True, help="Compute activations again instead of keeping them."),
    click.option("--bf16", is_flag=True, help="Autocast to bfloat16; weights and their rounding stay float32."),
    click.option("--checkpoint-every", metavar="N", type=COUNT, default=100, help="Steps between them."),
    click.option("--resume", is_flag=True, help="Go on with the interrupted run that --output holds."),
)
OUTPUT = (
    click.option(
        "--output", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Where the trained model goes."
    ),
    click.option("--fold", is_flag=True, help="Save the model with quantized weights too, in DIR/folded."),
    *RESULT,
)


@click.command(cls=Headed)
@with_options(RECIPE, "Recipe")
@with_options((*DATA, *CALIBRATION), "Data")
@with_options(TRAINING, "Training")
@with_options(COMPUTATION, "Computation")
@with_options(OUTPUT)
def finetune(json_file: str | None, quiet: bool, **options: Any) -> None:
    """Train MODEL under a recipe, and measure it before and after.

    Weights stay float32 and are quantized anew in every step; transforms come first. `qsim evaluate DIR` then
    gives the same number again.
    """
    from qsim_core.cli import progress

    with nullcontext() if quiet else progress.stage("starting"):  # torch takes seconds to load
        from qsim_finetune.training_table import show

    target = output_file(json_file)
    finetuned = _finetuned(options, quiet)
    if target is not None:
        finetuned.write(target)
    if json_file == "-":
        click.echo(finetuned.model_dump_json(indent=2))
    elif not quiet:
        show(finetuned, options["output"])


def _finetuned(options: dict[str, Any], quiet: bool) -> Finetuned:
    """Train with the command's options."""
    from qsim_core.cli import progress
    from qsim_core.cli.recipe_options import calibration_of, recipe_of
    from qsim_core.components.host import installed
    from qsim_core.transforms.run import Run
    from qsim_finetune.finetuning import finetune as train
    from qsim_finetune.output_directory import FOLDED
    from qsim_finetune.training import Training

    host = installed()
    progress.hush_libraries()
    warnings.simplefilter("ignore", CalibrationWarning)  # the results hold them
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
    options["learning_rate"], several = options["rates"][0], len(options["rates"]) > 1
    options["rates"] = options["rates"] if several else ()
    finetuned = train(
        recipe_of(options, host),
        options["output"],
        Training(**{name: options[name] for name in Training.model_fields}),
        host=host,
        data=options["data"],
        eval_data=options["eval_data"],
        valid_data=options["valid_data"],
        device=options["device"],
        calibration=calibration_of(options),
        resume=options["resume"],
        fold=options["fold"],
        run=Run(limit=options["limit"], **({} if quiet else progress.SHOWN)),
    )
    for name in finetuned.left_unfolded:
        click.echo(f"Warning: {name} is used elsewhere too, so {FOLDED} has it as it is", err=True)
    return finetuned
