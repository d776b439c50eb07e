"""What the command line shows of a training."""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qsim_core.cli import progress
from qsim_core.cli.report import calibration_of, recipe_of, value
from qsim_core.components.host import Host
from qsim_core.errors import CalibrationWarning
from qsim_core.evaluation.result import Result
from qsim_core.finetune.finetuning import CURVE, FOLDED, Finetuned, Training, finetune
from qsim_core.transforms.run import Run


def run(options: dict[str, Any], quiet: bool) -> Finetuned:
    """Carry out `qsim finetune` with its options."""
    host = Host()
    progress.hush_libraries()
    warnings.simplefilter("ignore", CalibrationWarning)  # the results hold them
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
    finetuned = finetune(
        recipe_of(options, host),
        options["output"],
        Training(**{name: options[name] for name in Training.model_fields}),
        host=host,
        data=options["data"],
        eval_data=options["eval_data"],
        device=options["device"],
        calibration=calibration_of(options),
        resume=options["resume"],
        fold=options["fold"],
        run=Run(limit=options["limit"], **({} if quiet else progress.SHOWN)),
    )
    for name in finetuned.left_unfolded:
        click.echo(f"Warning: {name} is used elsewhere too, so {FOLDED} has it as it is", err=True)
    return finetuned


def show(finetuned: Finetuned, output: Path) -> None:
    """The table of one training on standard output."""
    before, after, log = finetuned.before, finetuned.after, finetuned.log
    metric, recipe, training = before.metric, before.recipe, finetuned.training
    table = Table(title=before.model, title_justify="left", title_style="bold", show_header=False, min_width=60)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for key in ("weights", "activations", "outputs"):
        table.add_row(key, recipe[key] or "as they are")
    for transform in recipe["transforms"]:
        table.add_row("after", transform)
    samples = training.batch_size * training.accumulate
    aim = ", towards the float32 outputs" if training.distill else ""
    how = "trained in float32" if training.control else "trained"
    table.add_row(how, f"{log[-1].step} steps of {samples} samples, lr {training.learning_rate:g}{aim}")
    some = max(1, len(log) // 20)
    first, last = (statistics.mean(entry.loss for entry in part) for part in (log[:some], log[-some:]))
    table.add_row("training loss", f"{first:.4g} -> {last:.4g}")
    table.add_section()
    table.add_row(f"float32 {metric}", _measured(before, "baseline"))
    table.add_row("quantized", _measured(before, "simulated"))
    trained = "quantized after it" if training.control else "trained under it"
    table.add_row(trained, Text(_measured(after, "simulated"), "bold"))
    table.add_row("the same weights in float32", _measured(after, "baseline"))
    table.add_section()
    table.add_row("seconds, training", f"{finetuned.seconds:.1f}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    for line in (
        f"{before.protocol}; {before.data.name} (sha256 {before.data.sha256[:12]})",
        f"trained on {finetuned.data.name} (sha256 {finetuned.data.sha256[:12]})",
        f"{output} holds the model, what its sites hold, and {CURVE}; qsim evaluate {output} measures it again",
    ):
        console.print(line, style="dim", soft_wrap=True)


def _measured(result: Result, which: str) -> str:
    """The first metric, with its interval."""
    spread = result.intervals.get(result.metric)
    return value(getattr(result, which)[result.metric], getattr(spread, which) if spread else None)
