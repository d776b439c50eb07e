"""`qsim check`: the command, and what it prints."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qsim_interop.reading.findings import Examined

SHOWN = 20
"""Findings that are printed; `--json` has all."""


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every layer, and every finding.")
@click.pass_context
def check(ctx: click.Context, checkpoint: Path, as_json: bool) -> None:
    """Check a quantized checkpoint: what it holds, the recipe it stands for, and what is wrong with it.

    CHECKPOINT is a directory that save_pretrained wrote, or a GGUF file. Headers and scales are read; no model is
    built, and no GPU is needed. The exit code is 1 if anything is wrong.
    """
    from qsim_interop.reading.checkpoint import open_checkpoint
    from qsim_interop.reading.findings import examine

    examined = examine(open_checkpoint(checkpoint))
    if as_json:
        click.echo(json.dumps(_plain(examined), indent=2))
    else:
        _show(examined)
    ctx.exit(1 if examined.findings else 0)


def _plain(examined: Examined) -> dict[str, Any]:
    """The result as plain data."""
    return {
        "kind": examined.kind,
        "recipe": examined.recipe.record(),
        "packed": [
            {
                "module": layer.module,
                "shape": list(layer.shape),
                "weights": None if layer.weights is None else str(layer.weights),
                "form": layer.form or None,
                "activations": None if layer.activations is None else str(layer.activations),
            }
            for layer in examined.layers
        ],
        "plain": examined.plain,
        "bits_per_weight": examined.bits_per_weight,
        "bits_of_all": examined.bits_of_all,
        "findings": [{"where": finding.where, "what": finding.what} for finding in examined.findings],
        "notes": examined.notes,
    }


def _show(examined: Examined) -> None:
    """Print the checkpoint's kind, its layers by quantizer, its recipe, and the findings."""
    from rich.table import Table

    from qsim_core.cli.console import console

    out = console()
    out.print(f"{examined.kind}", highlight=False)
    table = Table("layers", "weights", "stored as", "inputs", box=None, pad_edge=False)
    layers, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for layer in examined.layers:
        key = str(layer.weights or layer.form), str(layer.activations or "as they are")
        layers[key] += 1
        sizes[key] += math.prod(layer.shape)
    for (weights, activations), count in layers.items():
        table.add_row(f"{count}", f"{sizes[weights, activations]:,}", weights, activations)
    out.print(table)
    if examined.bits_per_weight is not None:
        click.echo(f"{examined.bits_per_weight:.4g} bits per packed weight, {examined.bits_of_all:.4g} per parameter")
    if examined.plain:
        click.echo(f"not packed: {_some(examined.plain)}")
    click.echo(f"\n{examined.recipe.to_yaml()}")
    for note in examined.notes:
        click.echo(f"Note: {note}")
    for finding in examined.findings[:SHOWN]:
        click.echo(f"Finding: {finding}")
    if len(examined.findings) > SHOWN:
        click.echo(f"Finding: {len(examined.findings) - SHOWN} more like these (--json has them)")
    count = len(examined.findings)
    click.echo("nothing found wrong" if not count else f"{count} finding{'s' if count > 1 else ''}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
