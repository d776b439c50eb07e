"""The command line. It imports click and nothing heavy; each command imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from qsim_core.cli.new_plugin import new_plugin
from qsim_core.cli.options import CALIBRATION, FILE, POSITIVE, RECIPE, SHOWN, with_options
from qsim_core.cli.plugin_commands import PluginCommand, plugin_commands
from qsim_core.cli.plugins import lines, plugins, rows
from qsim_core.errors import QsimError
from qsim_core.version import __version__

INTERRUPTED = 130
"""The exit code of a run that Ctrl-C ended, as shells have it."""


class Commands(click.Group):
    """The core's commands and those of plugins; each ends in one clear line for what the user can put right.

    A command of the core goes before a plugin's command of the same name, so that no plugin can take it away.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command by name."""
        return sorted({*self.commands, *_of_plugins(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name. A plugin's command is not imported yet."""
        return self.commands.get(cmd_name) or _of_plugins(ctx).get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name. An unknown name is an error that says which one was meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            raise click.NoSuchCommand(error.command_name, possibilities=self.list_commands(ctx), ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; qsim's own errors become click's, Ctrl-C an exit code."""
        if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character shows a question mark
            sys.stdout.reconfigure(errors="replace")
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except QsimError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is left in the buffer has nowhere to go
            raise click.ClickException(f"cannot write the output: {error.strerror or error}") from error
        except KeyboardInterrupt:
            click.echo("Error: interrupted; nothing was written", err=True)
            ctx.exit(INTERRUPTED)


def _of_plugins(ctx: click.Context) -> dict[str, PluginCommand]:
    """The commands of plugins, looked up once in a run."""
    found: dict[str, PluginCommand] = ctx.meta.setdefault(PluginCommand.__module__, {})
    if not found:
        found |= plugin_commands()
    return found


def _version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    """qsim's version, what it stands on, and every plugin's, from the installed metadata alone."""
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import version
    from platform import python_version

    click.echo(f"qsim {__version__}, Python {python_version()}, torch {version('torch')}")
    for line in lines(rows()):
        click.echo(line)
    ctx.exit()


def _target(json_file: str | None) -> Path | None:
    """The file that --json names, if it names one. Raises `QsimError` before hours of work if it cannot be written."""
    from qsim_core.files import check_writable

    if json_file in (None, "-"):
        return None
    check_writable(path := Path(json_file))
    return path


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the versions of qsim and of every plugin, and exit.",
)
def main() -> None:
    """What does a model lose when its matmuls run in other number formats?

    \b
    qsim evaluate --plugin abfp                     the zoo's OPT under ABFP, weights and activations INT4
    qsim evaluate MODEL --precision w4a8            per-channel INT4 weights, per-token INT8 activations
    qsim finetune --plugin abfp --output DIR        train under that precision, and measure it before and after
    qsim components                                 every number format and method that is installed
    """


@main.command()
@with_options(RECIPE)
@click.option("--from", "record", type=click.Path(path_type=Path), metavar="FILE", help="Run a result's record again.")
@click.option(
    "--data", type=FILE, metavar="FILE|NAME", help="Data: a file, or a name for `datasets` (NAME[:CONFIG[:SPLIT]])."
)
@with_options(CALIBRATION)
@click.option("--work-dir", type=click.Path(path_type=Path), metavar="DIR", help="Keep there what other runs can use.")
@click.option(
    "--device",
    default="cpu",
    help="Where to compute: cpu, cuda, cuda:1, …; auto: weights on GPUs, in memory, on disk as they fit; disk.",
)
@click.option("--dtype", default="float32", help="Arithmetic of the model and the simulation.")
@click.option("--batch-size", metavar="N", type=click.IntRange(1), default=8, help="Samples computed at a time.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Evaluate so many samples only.")
@click.option(
    "--seed", metavar="N", type=int, default=0, help="Seed of drawn samples; stochastic rounding has `seed=`."
)
@click.option(
    "--save-samples", "samples", type=click.Path(path_type=Path), metavar="DIR", help="Write what there is to look at."
)
@click.option("--allow-code-execution", is_flag=True, help="Let an evaluator run programs that the model writes.")
@click.option("--dry-run", is_flag=True, help="Print the recipe that would run, and stop.")
@with_options(SHOWN)
@click.pass_context
def evaluate(ctx: click.Context, /, json_file: str | None, quiet: bool, **options: Any) -> None:
    """Measure MODEL as it is and in another precision.

    MODEL is a directory, a hub name, or a model of the zoo (default: opt-tiny).
    """
    from qsim_core.cli import progress

    with nullcontext() if quiet else progress.stage("starting"):  # torch takes its time to load
        from qsim_core.cli import report

    target = _target(json_file)
    given = {name for name in options if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    result = report.run(options, given, quiet=quiet)
    if result is None:
        return
    if target is not None:
        result.write(target)
    if json_file == "-":
        click.echo(result.model_dump_json(indent=2))
    elif not quiet:
        report.show(result)


@main.command()
@with_options(RECIPE)
@click.option(
    "--data", type=FILE, metavar="FILE|NAME", help="Data to train on; default: the train split of the model's own."
)
@click.option(
    "--eval-data", type=FILE, metavar="FILE|NAME", help="Data to measure on; default: the model's own, or a test split."
)
@with_options(CALIBRATION)
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Where the trained model goes."
)
@click.option(
    "--steps", metavar="N", type=click.IntRange(1), help="Optimizer steps; default: as many as the epochs have."
)
@click.option("--epochs", metavar="X", type=POSITIVE, default=1.0, help="Passes over the data.")
@click.option("--batch-size", metavar="N", type=click.IntRange(1), default=8, help="Samples at a time.")
@click.option("--accumulate", metavar="N", type=click.IntRange(1), default=1, help="Batches in one step.")
@click.option("--lr", "learning_rate", metavar="X", type=POSITIVE, default=1e-4, help="Highest learning rate.")
@click.option(
    "--seqlen", metavar="N", type=click.IntRange(2), help="Tokens of a sample; default: what the evaluator takes."
)
@click.option("--seed", metavar="N", type=int, default=0, help="Seed of the order of samples and of dropout.")
@click.option("--checkpoint-every", metavar="N", type=click.IntRange(1), default=100, help="Steps between them.")
@click.option("--distill", is_flag=True, help="Learn the float32 model's outputs instead of the data's labels.")
@click.option("--control", is_flag=True, help="Train in float32 and round afterwards: what training alone does.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted run that --output holds.")
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations again instead of keeping them.")
@click.option("--bf16", is_flag=True, help="Autocast to bfloat16; weights and their rounding stay float32.")
@click.option("--fold", is_flag=True, help="Save the model with quantized weights too, in DIR/folded.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to compute.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Measure on so many samples only.")
@with_options(SHOWN)
def finetune(json_file: str | None, quiet: bool, **options: Any) -> None:
    """Train MODEL under a recipe, and measure it before and after.

    Weights stay float32 and are quantized anew in every step; transforms come first. `qsim evaluate DIR` then
    gives the same number again.
    """
    from qsim_core.cli import progress

    with nullcontext() if quiet else progress.stage("starting"):  # torch takes its time to load
        from qsim_core.finetune import report as finetuning_report

    target = _target(json_file)
    finetuned = finetuning_report.run(options, quiet=quiet)
    if target is not None:
        finetuned.write(target)
    if json_file == "-":
        click.echo(finetuned.model_dump_json(indent=2))
    elif not quiet:
        finetuning_report.show(finetuned, options["output"])


@main.command()
@click.argument("name", required=False)
@click.option("--table", is_flag=True, help="Print every code of the number format NAME and its value.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def components(name: str | None, table: bool, as_json: bool) -> None:
    """List every component, or show NAME with its options.

    With --table NAME may be any format's text, like 'float(3, 4)'.
    """
    from qsim_core.cli import listing
    from qsim_core.components.host import Host

    if table:
        if name is None:
            raise click.UsageError("--table needs the NAME of a number format, like e4m3")
        listing.codes(Host(), name, as_json)
    else:
        listing.components(Host(), name, as_json)


@main.command()
@click.option("--work-dir", type=click.Path(path_type=Path), metavar="DIR", help="What runs have kept there, too.")
@click.option(
    "--clear", is_flag=False, flag_value="all", metavar="[KIND]", help="Remove everything shown, or one kind of it."
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cache(work_dir: Path | None, clear: str | None, yes: bool, as_json: bool) -> None:
    """Show what is kept to be used again, and remove it: compiled kernels, models that the zoo has made.

    With --work-dir also what `qsim evaluate --work-dir DIR` has kept: baselines, statistics and blocks. All of it is
    made again when it is needed.
    """
    from qsim_core.cli import cache as caches

    if clear is None:
        caches.show(work_dir, as_json)
    else:
        caches.clear(work_dir, clear, yes, as_json)


@main.command()
@click.argument("source", metavar="IN.safetensors", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT.safetensors", type=click.Path(path_type=Path))
@click.option(
    "--weights", metavar="TEXT", required=True, help="Quantizer, like 'abfp(int4)'; a format means channel(F)."
)
@click.option(
    "--skip", multiple=True, metavar="PATTERN", help="Tensors to copy as they are, like '*embed*'; repeatable."
)
@click.option("--conv1d", multiple=True, metavar="PATTERN", help="Tensors of three axes that are kernels; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every tensor, what was done to it, its error.")
@click.option("--quiet", "-q", is_flag=True, help="No progress, no table.")
def quantize(source: Path, target: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Round the weights in a file of tensors; the output has the same names, shapes and dtypes.

    Every tensor of float16, bfloat16, float32 or float64 with two axes and more is a weight, its rows along the last
    axis (a kernel's over its input channels and taps); everything else is copied, float8 and whole numbers too.
    Memory is bounded by the largest tensor.
    """
    from qsim_core.cli import report
    from qsim_core.components.host import Host

    report.quantize(Host(), source, target, as_json=as_json, quiet=quiet, **options)


main.add_command(new_plugin)
main.add_command(plugins)
