"""Commands that plugins bring: found in the metadata, described from their source, imported when they are run."""

from __future__ import annotations

import ast
import importlib.util
import re
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click

from qsim_core.components.discovery import COMMANDS, Plugin, import_plugin, installed
from qsim_core.errors import PluginError


class PluginCommand(click.Command):
    """Stands for a plugin's command until it is run.

    A group asks it for its name and its short help. Parsing its arguments imports the command and hands over to it.
    """

    def __init__(self, plugin: Plugin) -> None:
        super().__init__(plugin.name)
        self.plugin = plugin

    def get_short_help_str(self, limit: int = 45) -> str:
        """The command's first sentence, or the distributions that claim its name."""
        if self.plugin.rivals:
            return f"(claimed by {self.plugin.claimants})"
        self.help = self.help or description(self.plugin.entry)
        return super().get_short_help_str(limit)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Import the command and make its context. Raises `PluginError`; a shell's completion gets no options then."""
        try:
            command = load_command(self.plugin)
        except PluginError:
            if extra.get("resilient_parsing"):
                return super().make_context(*args, **extra)
            raise
        return command.make_context(*args, **extra)


def plugin_commands() -> dict[str, PluginCommand]:
    """Every command of a plugin by name; nothing is imported."""
    return {name: PluginCommand(plugin) for name, plugin in installed([COMMANDS])[COMMANDS].items()}


def load_command(plugin: Plugin) -> click.Command:
    """Import a plugin's command. Raises `PluginError` if that fails, or if it is not a command."""
    command = import_plugin(plugin)
    if not isinstance(command, click.Command):
        raise PluginError(f"{plugin} is not a click command but {type(command).__name__}; {plugin.remedy}")
    return command


def description(entry: EntryPoint | None) -> str:
    """The docstring of the command's function, read from the source; otherwise the distribution's summary.

    Importing the command would give the same text, and take as long as its imports take. The summary speaks of the
    distribution, which may have several commands, so it is the second choice.
    """
    if entry is None:
        return ""
    return _docstring(entry.module, entry.attr) or _summary(entry)


def _docstring(module: str, function: str) -> str:
    """The docstring of a function at the top of a module. Empty if the module or the function is not found."""
    try:
        spec = _find(module)
        if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
            return ""
        source = Path(str(spec.origin)).read_text(encoding="utf-8")
        found = re.search(rf"^def {re.escape(function)}\(.*?(?=^[^\s)]|\Z)", source, re.MULTILINE | re.DOTALL)
        tree = ast.parse(found[0] if found else "")  # the function alone, which takes a tenth of the module's time
    except (ImportError, OSError, SyntaxError, ValueError):
        return ""
    return next((ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef)), "")


def _find(module: str) -> ModuleSpec | None:
    """The module's place. Its packages are not imported, as `importlib.util.find_spec` alone would do."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    name = top
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _summary(entry: EntryPoint) -> str:
    return str(entry.dist.metadata["Summary"] or "") if entry.dist is not None else ""
