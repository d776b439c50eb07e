"""`qsim plugins`: the distributions that extend qsim, and what each of them provides."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from qsim_core.cli.installed import lines, rows
from qsim_core.errors import PluginError, QsimError

if TYPE_CHECKING:
    from qsim_core.components.discovery import Plugin
    from qsim_core.components.host import Host

LIMIT = 600.0
"""Seconds for the comparison of one accelerator with the reference, which may have to compile."""


def failures(built_in: Collection[str]) -> dict[tuple[str, str], list[str]]:
    """The messages of all that cannot be used or gives wrong bits, by name and distribution.

    Each plugin is imported in a process of its own. `built_in` are the names of the core's own commands.
    """
    from qsim_core.components.catalogue import catalogue, subject
    from qsim_core.components.discovery import ACCELERATORS, COMMANDS, GROUP, installed
    from qsim_core.components.host import Host
    from qsim_core.components.plugin_process import ask

    everything = [plugin for group in installed((GROUP, COMMANDS, ACCELERATORS)).values() for plugin in group.values()]
    found: dict[tuple[str, str], list[str]] = {}

    def fault(plugin: Plugin, message: object) -> None:
        for distribution, _ in plugin.claims:
            found.setdefault((plugin.name, distribution), []).append(str(message))

    usable = []
    for plugin, described in zip(everything, catalogue(everything, again=True), strict=True):
        if isinstance(described, PluginError):
            fault(plugin, described)
        elif plugin.group == COMMANDS and plugin.name in built_in:
            fault(plugin, f"{plugin} cannot be run: `qsim {plugin.name}` is a command of qsim-core")
        elif plugin.group != GROUP or any(offer.text is not None for offer in described):
            usable.append(plugin)
    answers = ask(faults_of, [subject(plugin) for plugin in usable], limit=LIMIT)
    for plugin, answer in zip(usable, answers, strict=True):
        for message in [f"{plugin}: {answer}"] if isinstance(answer, PluginError) else answer:
            fault(plugin, message)
    host = Host()
    for name, message in rivals(host):
        fault(host.plugins[name], message)
    return found


def faults_of(subject: dict[str, str]) -> list[str]:
    """The faults of a plugin that can be imported, such as a preset that cannot be built."""
    from qsim_core.cli.plugin_commands import load_command
    from qsim_core.components.discovery import ACCELERATORS, COMMANDS, installed
    from qsim_core.components.host import Host
    from qsim_listing.accelerator_check import disagreements

    name, group = subject["name"], subject["group"]
    try:
        if group == ACCELERATORS:
            return [f"accelerator {name}: {message}" for message in disagreements(Host(), name)]
        if group == COMMANDS:
            load_command(installed([COMMANDS])[COMMANDS][name])
        else:
            return _presets_that_cannot_be_built(Host(), name)
    except PluginError as error:
        return [str(error)]
    return []


def _presets_that_cannot_be_built(host: Host, name: str) -> list[str]:
    """A message about the first preset of a plugin that cannot be built. Raises `PluginError` if it does not load."""
    host.load(name)
    for offer in (offer for offers in host.offers().values() for offer in offers if offer.plugin == name):
        try:
            if offer.text is not None:
                host.parse(f"{name}.{offer.name}")
        except QsimError as error:
            return [f"{host.plugins[name]}: {error}"]
    return []


def rivals(host: Host) -> Iterator[tuple[str, str]]:
    """Give each plugin that offers what another one offers too, with a message that names both."""
    found: dict[tuple[str, str], list[str]] = {}
    for offer in (offer for offers in host.offers().values() for offer in offers):
        found.setdefault((host.hook_of(offer), f"component {offer.name!r}"), []).append(offer.plugin)
        for family in {*offer.families, offer.name} if offer.hook == "qsim_adapters" else ():
            found.setdefault(("family", f"family {family!r}"), []).append(offer.plugin)
        for model in offer.models:
            found.setdefault(("model", f"model {model!r}"), []).append(offer.plugin)
    for (_, what), plugins in found.items():
        others = sorted(set(plugins))
        for plugin in others if len(others) > 1 else ():
            yield plugin, f"{what} is offered by {' and '.join(str(host.plugins[other]) for other in others)}"


@click.command()
@click.option(
    "--check",
    is_flag=True,
    help="Import each plugin by itself, and compare accelerators with the reference; exit code 1 on a fault.",
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
            record = asdict(row)
            if check:
                record["error"] = "; ".join(failed.get((row.name, row.distribution), [])) or None
            records.append(record)
        click.echo(json.dumps(records, indent=2))
    else:
        width = max(len(line) for line in lines(found))
        for row, line in zip(found, lines(found), strict=True):
            click.echo(
                f"{line:{width}}  {'fails' if (row.name, row.distribution) in failed else 'ok'}" if check else line
            )
    for message in dict.fromkeys(message for plugin in sorted(failed) for message in failed[plugin]):
        click.echo(f"Warning: {message}", err=True)
    if failed:
        sys.exit(1)
