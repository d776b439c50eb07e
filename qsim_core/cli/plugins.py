"""`qsim plugins`: the distributions that extend qsim, and what each of them provides."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from qsim_core.errors import PluginError

if TYPE_CHECKING:
    from qsim_core.components.discovery import Plugin


@dataclass(frozen=True)
class Row:
    """One name of one distribution, and what it provides under that name."""

    name: str
    distribution: str
    version: str
    provides: tuple[str, ...]


def rows() -> list[Row]:
    """Every name that a distribution has in one of the entry-point groups, sorted. Nothing is imported."""
    from qsim_core.components.discovery import ACCELERATORS, COMMANDS, installed
    from qsim_core.components.host import Host

    others = installed((COMMANDS, ACCELERATORS))
    provided = {"components": Host().plugins, "command": others[COMMANDS], "accelerator": others[ACCELERATORS]}
    found: dict[tuple[str, str, str], list[str]] = {}
    for what, plugins_of_group in provided.items():
        for plugin in plugins_of_group.values():
            for claimant in plugin.claims:
                found.setdefault((plugin.name, *claimant), []).append(what)
    return [Row(*key, tuple(provides)) for key, provides in sorted(found.items())]


def lines(found: Collection[Row]) -> list[str]:
    """Name, distribution, version and what is provided, in columns."""
    columns = [(row.name, row.distribution, row.version, ", ".join(row.provides)) for row in found]
    widths = [max(len(column[i]) for column in columns) for i in range(3)]
    return ["  ".join(f"{text:{width}}" for text, width in zip(c, (*widths, 0), strict=True)) for c in columns]


def failures(built_in: Collection[str]) -> dict[str, list[str]]:
    """The messages of all that does not load or gives wrong bits, by name; `built_in` are the core's own commands."""
    from qsim_core.cli.plugin_commands import load_command
    from qsim_core.components.discovery import ACCELERATORS, COMMANDS, import_plugin, installed
    from qsim_core.components.host import Host
    from qsim_core.quantizers.accelerator_check import disagreements

    found = {name: [str(error)] for name, error in Host().verify().items()}

    def attempt(plugin: Plugin) -> None:
        try:
            if plugin.group == ACCELERATORS:
                import_plugin(plugin)
            else:
                load_command(plugin)
        except PluginError as error:
            found.setdefault(plugin.name, []).append(str(error))

    others = installed((COMMANDS, ACCELERATORS))
    for group in others.values():
        for plugin in group.values():
            attempt(plugin)
    for name, messages in disagreements(Host()).items():
        found.setdefault(name, []).extend(f"accelerator {name}: {message}" for message in messages)
    for name in built_in & others[COMMANDS].keys():
        plugin = others[COMMANDS][name]
        found.setdefault(name, []).append(f"{plugin} cannot be run: `qsim {name}` is a command of qsim-core")
    return found


@click.command()
@click.option(
    "--check",
    is_flag=True,
    help="Load each plugin, and compare accelerators with the reference; exit code 1 on a fault.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plugins(ctx: click.Context, check: bool, as_json: bool) -> None:
    """List the plugins that are installed. Without --check none of them is imported.

    A plugin provides components (formats, methods, models, evaluators), a command, or an accelerator.
    """
    parent = ctx.parent.command if ctx.parent is not None else None
    built_in = parent.commands.keys() if isinstance(parent, click.Group) else frozenset()
    failed = failures(built_in) if check else {}
    found = rows()
    if as_json:
        records = []
        for row in found:
            record: dict[str, object] = {
                "name": row.name,
                "distribution": row.distribution,
                "version": row.version,
                "provides": list(row.provides),
            }
            if check:
                record["error"] = "; ".join(failed[row.name]) if row.name in failed else None
            records.append(record)
        click.echo(json.dumps(records, indent=2))
    else:
        width = max(len(line) for line in lines(found))
        for row, line in zip(found, lines(found), strict=True):
            click.echo(f"{line:{width}}  {'fails' if row.name in failed else 'ok'}" if check else line)
    for name in sorted(failed):
        for message in failed[name]:
            click.echo(f"Warning: {message}", err=True)
    if failed:
        sys.exit(1)
