"""Options of the command line that several commands have, and how a shell completes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem


def output_file(json_file: str | None) -> Path | None:
    """The file that --json names, if it names one. Raises `QsimError` if the result could not be written there."""
    from qsim_core.files import check_writable

    if json_file in (None, "-"):
        return None
    check_writable(path := Path(str(json_file)))
    return path


def complete_plugin(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Plugins by name, their distributions as help; none is imported, so that Tab is answered at once."""
    from qsim_core.components.host import installed

    found = installed().plugins.values()
    return [CompletionItem(p.name, help=p.distribution) for p in found if p.name.startswith(incomplete)]


def complete_directory(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete directories: which models a plugin knows, only importing it would tell."""
    return [CompletionItem(incomplete, type="dir")]


FILE = click.Path(readable=False)
"""A file's name that may be something else: text, and the shell completes it."""


class _Finite(click.FloatRange):
    """A number in a range that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


POSITIVE = _Finite(0, min_open=True)
COUNT = click.IntRange(1, 2**31 - 1)
"""A number of things that are computed one after the other, or held in memory."""
LENGTH = click.IntRange(2, 2**31 - 1)
"""A number of tokens."""
SEED = click.IntRange(0, 2**63 - 1)
"""Every generator of random numbers takes it."""
RESULT = (
    click.option(
        "--json", "json_file", type=FILE, metavar="FILE", help="Write the result as JSON; - for standard output."
    ),
    click.option("--quiet", "-q", is_flag=True, help="No progress, no table."),
)
"""The options that say where a result goes."""

RECIPE = (
    click.argument("model", required=False, shell_complete=complete_directory),
    click.option(
        "--plugin",
        "plugins",
        multiple=True,
        metavar="NAME",
        shell_complete=complete_plugin,
        help="Use the component of that name; repeatable.",
    ),
    click.option("--precision", metavar="wXaY", help="Bits of weights and activations, like w4a8."),
    click.option("--weights", metavar="TEXT", help="Quantizer of weights, like 'block(int4, n=64)'; none for none."),
    click.option("--activations", metavar="TEXT", help="Quantizer of every input of a matmul."),
    click.option("--outputs", metavar="TEXT", help="Quantizer of every result of a matmul."),
    click.option("--static", metavar="CALIBRATOR", help="One static scale for each activation, like mse or entropy."),
    click.option("--value-axis", type=click.Choice(["tokens", "head"]), help="Along which axis v's scales are shared."),
    click.option(
        "--arithmetic",
        metavar="TEXT",
        help="How products are computed: auto (exact, and fastest here), float32, int8, …, or a device's own.",
    ),
    click.option(
        "--operations",
        metavar="YAML",
        help="How operations between products are computed, like 'softmax: table(8, base=2)'.",
    ),
    click.option("--kv-cache", metavar="TEXT", help="Quantizer of attention's keys and values."),
    click.option("--skip", multiple=True, metavar="PATTERN", help="Sites to leave alone; 'none' for none; repeatable."),
    click.option(
        "--set", "settings", multiple=True, metavar="NAME.OPTION=VALUE", help="Change an option, like block.n=128."
    ),
    click.option("--evaluator", metavar="TEXT", help="What to measure, like 'perplexity(seqlen=2048)'."),
    click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="A recipe in YAML or JSON."),
)
"""The options that say which model and under which recipe."""
ON = click.option(
    "--on",
    multiple=True,
    metavar="TEXT|FILE.yaml",
    help="Say what a forward costs on this hardware: its name, or a file; repeatable.",
)
PRODUCTS_ONLY = click.option(
    "--products-only", is_flag=True, help="Leave out of the costs of --on what lies between the matmuls, like softmax."
)
DATA = (
    click.option(
        "--data", type=FILE, metavar="FILE|NAME", help="Data: a file, or a name for `datasets` (NAME[:CONFIG[:SPLIT]])."
    ),
    click.option("--limit", metavar="N", type=COUNT, help="Evaluate so many samples only."),
    click.option(
        "--seed", metavar="N", type=SEED, default=0, help="Seed of drawn samples; stochastic rounding has `seed=`."
    ),
)
"""The options that say what a model is evaluated on."""
CALIBRATION = (
    click.option(
        "--calibration-data",
        type=FILE,
        metavar="FILE|NAME",
        help="Data that transforms look at; default: the model's own.",
    ),
    click.option("--calibration-samples", metavar="N", type=COUNT, default=32, help="So many samples."),
    click.option("--calibration-seqlen", metavar="N", type=LENGTH, help="Tokens of a sample; default: a window's."),
    click.option("--calibration-seed", metavar="N", type=SEED, help="Seed that draws them; default: that of --seed."),
)
"""The options that say what transforms and static scales look at."""
COMPUTATION = (
    click.option(
        "--device",
        default="cpu",
        help="Where to compute: cpu, cuda, cuda:1, …; auto: weights on GPUs, in memory, on disk as they fit; disk.",
    ),
    click.option("--dtype", default="float32", help="Arithmetic of the model and the simulation."),
    click.option("--batch-size", metavar="N", type=COUNT, default=8, help="Samples computed at a time."),
)
"""The options that say where and how numbers are computed."""


LAST = "Options"
"""The heading of the options that `with_options` was given no heading for, and of those of click itself."""


def with_options(options: Iterable[Callable[[Any], Any]], heading: str = LAST) -> Callable[[Any], Any]:
    """A decorator that gives a command several options, in this order, under a heading of its --help."""

    def decorate(command: Any) -> Any:
        given = len(getattr(command, "__click_params__", ()))
        for option in reversed(tuple(options)):
            command = option(command)
        for parameter in command.__click_params__[given:]:
            parameter.heading = heading
        return command

    return decorate


def by_heading(command: click.Command, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
    """The options of a command with their help, under the headings that `with_options` gave them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
        if record is not None:
            found.setdefault(getattr(parameter, "heading", LAST), []).append(record)
    return found


class Headed(click.Command):
    """A command whose --help groups the options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each group under its heading."""
        for heading, records in by_heading(self, ctx).items():
            with formatter.section(heading):
                formatter.write_dl(records)
