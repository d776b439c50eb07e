"""The group of commands, `qsim`. It imports click and nothing heavy; a command imports what it needs when it runs."""

from __future__ import annotations

import difflib
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from qsim_core.cli.evaluate import evaluate
from qsim_core.cli.installed import lines, rows
from qsim_core.errors import QsimError, one_line
from qsim_core.version import __version__

if TYPE_CHECKING:
    from qsim_core.cli.plugin_commands import PluginCommand

DEBUG = "QSIM_DEBUG"
"""The environment variable that shows the traceback of an unexpected error."""
INTERRUPTED = 130
"""The exit code of a run that Ctrl-C ended, as shells have it."""
EVERYTHING = "qsim-core[all]"
"""The core with the plugins, which bring most commands."""
OF_PLUGINS = "qsim.commands"
"""The key of the plugins' commands in click's `Context.meta`."""


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
            name, known = error.command_name, self.list_commands(ctx)
            missing = f"No such command {name!r}; pip install {EVERYTHING!r} brings every command of qsim."
            message = None if difflib.get_close_matches(name, known) else missing
            raise click.NoSuchCommand(name, message, known, ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; qsim's own errors become click's, Ctrl-C an exit code."""
        _open_streams()
        _check_directory()
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
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except Exception as error:  # a fault of qsim, or of a plugin
            if os.environ.get(DEBUG):
                raise
            said = f"{type(error).__name__}: {one_line(error)}"
            raise click.ClickException(f"qsim failed, by a fault of its own: {said}; {DEBUG}=1 shows where") from error
        except KeyboardInterrupt:
            click.echo("Error: interrupted; nothing was written", err=True)
            ctx.exit(INTERRUPTED)


def _open_streams() -> None:
    """Open the standard streams that the caller has closed on nothing: what is printed there is lost, as was asked."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _check_directory() -> None:
    """Raise an error if the working directory is gone: relative paths mean nothing then."""
    try:
        os.getcwd()
    except OSError:
        raise click.ClickException("the working directory was deleted; change to another one") from None


def _of_plugins(ctx: click.Context) -> dict[str, PluginCommand]:
    """The commands of plugins, looked up once in a run."""
    from qsim_core.cli.plugin_commands import plugin_commands

    found: dict[str, PluginCommand] | None = ctx.meta.get(OF_PLUGINS)
    if found is None:
        found = ctx.meta[OF_PLUGINS] = plugin_commands()
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
    """Measure what a model loses when its matmuls run in other number formats.

    \b
    qsim evaluate MODEL --precision w4a8     per-channel INT4 weights, per-token INT8 activations
    qsim evaluate MODEL --plugin NAME        the format or method of that plugin
    qsim components                          every number format and method that is installed
    qsim plugins                             what is installed, and which commands it brings
    """


main.add_command(evaluate)
