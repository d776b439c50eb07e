"""`qsim quantize`: the command and its options, and the table that it prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsim_core.errors import RecipeError

if TYPE_CHECKING:
    from qsim_core.formats.quantizer import Quantizer
    from qsim_tensorfile.rounding import Rounded


@click.command()
@click.argument("source", metavar="IN.safetensors", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT.safetensors", type=click.Path(path_type=Path))
@click.option(
    "--weights", metavar="TEXT", required=True, help="Quantizer, like 'block(int4, 64)'; a format means channel(F)."
)
@click.option(
    "--skip", multiple=True, metavar="PATTERN", help="Tensors to copy as they are, like '*embed*'; repeatable."
)
@click.option("--conv1d", multiple=True, metavar="PATTERN", help="Tensors of three axes that are kernels; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every tensor, what was done to it, its error.")
@click.option("--quiet", "-q", is_flag=True, help="No progress, no table.")
def quantize(source: Path, target: Path, weights: str, as_json: bool, quiet: bool, **patterns: Any) -> None:
    """Round the weights in a file of tensors; the output has the same names, shapes and dtypes.

    A tensor of float16, bfloat16, float32 or float64 with two axes and more is a weight. Its rows are along the last
    axis; those of a kernel are over its input channels and taps. All other tensors are copied, float8 and integers too.
    Memory is bounded by the largest tensor.
    """
    from qsim_core.cli import progress
    from qsim_core.transforms.run import Run
    from qsim_tensorfile.rounding import quantize_file

    run = Run(**({} if quiet else progress.SHOWN))
    tensors = quantize_file(source, target, _quantizer(weights), track=run.track, **patterns)
    if codes := {tensor.decodes for tensor in tensors if tensor.decodes is not None}:
        line = f"weights of {source} that are stored quantized ({', '.join(sorted(codes))}) stay so, with their scales"
        click.echo(f"Warning: {line}", err=True)
    if as_json:
        click.echo(json.dumps([asdict(tensor) for tensor in tensors], indent=2))
    elif not quiet:
        _show(tensors, target)


def _quantizer(text: str) -> Quantizer:
    """The quantizer that --weights names; a format becomes the usual scheme of weights."""
    from qsim_core.components.host import installed
    from qsim_core.simulation.recipe import Recipe

    quantizer = None if text == "none" else Recipe.of({"weights": text}, installed()).weights
    if quantizer is None:
        raise RecipeError("--weights none rounds nothing; name a quantizer, like 'block(int4, 64)'")
    return quantizer


def _show(tensors: list[Rounded], target: Path) -> None:
    """Print the rounded tensors, each with its quantizer and its error."""
    from rich.table import Table

    from qsim_core.cli.console import console, print_below
    from qsim_core.cli.result_table import bits

    table = Table("tensor", "shape", "quantizer", "SQNR in dB", "bits", box=None, pad_edge=False)
    rounded = [tensor for tensor in tensors if tensor.quantizer is not None]
    for tensor in rounded:
        sqnr = "exact" if tensor.sqnr_db is None else f"{tensor.sqnr_db:.1f}"
        table.add_row(tensor.name, " x ".join(map(str, tensor.shape)), tensor.quantizer, sqnr, bits(tensor.bits))
    out = console()
    out.print(table)
    print_below(out, f"{len(rounded)} of {len(tensors)} tensors rounded, the others copied, to {target}")
