"""The command `qsim structure`. It imports click and nothing heavy; the rest is imported when it runs."""

from __future__ import annotations

import json

import click

from qsim_core.cli.options import FILE, complete_directory


@click.command()
@click.argument("model", required=False, shell_complete=complete_directory)
@click.option("--data", type=FILE, metavar="FILE|NAME", help="Data to take the example from; default: the model's own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def structure(model: str | None, data: str | None, as_json: bool) -> None:
    """Show the structure of a model: blocks, norms, attention.

    Each norm is shown with the weights that read it, and each norm or weight that may not be changed with the reasons.
    The structure is found by running one example. Norms that the model's adapter declares are marked.
    """
    import torch
    from rich.text import Text

    from qsim_core import Host, QsimError, Recipe, simulate
    from qsim_core.cli.console import console
    from qsim_core.cli.progress import hush_libraries
    from qsim_core.evaluation.job import Job
    from qsim_core.transforms.blocks import block_paths
    from qsim_structure.for_transforms import trace_example
    from qsim_structure.listing import record, sections

    hush_libraries()
    host = Host()
    job = Job.of(Recipe.of({"model": model}, host), host)
    for note in job.located.notes("float32"):
        click.echo(f"Warning: {note}", err=True)
    loaded = job.located.adapter.load(job.located.source, torch.float32)
    example = job.evaluator.example(loaded, job.data(data))
    if example is None:
        raise QsimError(f"{job.evaluator} has no example to run; call qsim_structure.trace from Python")
    simulation = simulate(loaded.model, example=example)
    blocks = block_paths(loaded.model, simulation.sites.table.values())
    simulation.restore()
    declared = job.located.adapter.structure(loaded.model)
    found = trace_example(loaded.model, example, declared)
    if as_json:
        click.echo(json.dumps({"blocks": blocks, **record(found, declared or ())}, indent=2))
        return
    out = console(soft_wrap=True)
    ends = f"{blocks[0] or 'the model'} to {blocks[-1] or 'the model'}"
    out.print(Text(job.located.name, "bold") + Text(f": {len(blocks)} blocks, {ends}"))
    for section in sections(found, declared or ()):
        out.print(f"\n{section.title}", style="bold")
        for line in section.lines:
            out.print(f"  {line}", style="dim" if section.refused else "")
