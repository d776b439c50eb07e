"""The table that `qsim finetune` prints, and the lines under it."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.text import Text

from qsim_core.cli.console import console, print_below
from qsim_core.cli.result_table import measured, recipe_table
from qsim_finetune.output_directory import CURVE
from qsim_finetune.training import Finetuned


def show(finetuned: Finetuned, output: Path) -> None:
    """The table of one training on standard output."""
    before, after, log = finetuned.before, finetuned.after, finetuned.log
    metric, training = before.metric, finetuned.training
    table = recipe_table(before)
    samples = training.batch_size * training.accumulate
    aim = ", towards the float32 outputs" if training.distill else ""
    how = "trained in float32" if training.control else "trained"
    table.add_row(how, f"{log[-1].step} steps of {samples} samples, lr {training.learning_rate:g}{aim}")
    some = max(1, len(log) // 20)
    first, last = (statistics.mean(entry.loss for entry in part) for part in (log[:some], log[-some:]))
    table.add_row("training loss", f"{first:.4g} -> {last:.4g}")
    table.add_section()
    table.add_row(f"float32 {metric}", measured(before, "baseline"))
    table.add_row("quantized", measured(before, "simulated"))
    trained = "quantized after it" if training.control else "trained under it"
    table.add_row(trained, Text(measured(after, "simulated"), "bold"))
    table.add_row("the same weights in float32", measured(after, "baseline"))
    table.add_section()
    table.add_row("seconds, training", f"{finetuned.seconds:.1f}")
    out = console()
    out.print(table)
    for line in (
        f"{before.protocol}; {before.data.name} (sha256 {before.data.sha256[:12]})",
        f"trained on {finetuned.data.name} (sha256 {finetuned.data.sha256[:12]})",
        f"{output} holds the model, what its sites hold, and {CURVE}; qsim evaluate {output} measures it again",
    ):
        print_below(out, line)
