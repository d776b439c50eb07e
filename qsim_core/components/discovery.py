"""Plugins as the installed metadata name them, before anything is imported."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "qsim"


@dataclass(frozen=True)
class Plugin:
    """A plugin that metadata (or `Host.register`) tells of; not necessarily one that loads."""

    name: str
    distribution: str
    version: str
    entry: EntryPoint | None = None
    module: Any = None
    rivals: tuple[str, ...] = ()
    """Other distributions that claim the same name."""

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.distribution} {self.version})"


def installed_plugins() -> dict[str, Plugin]:
    """Every plugin that the installed metadata name; nothing is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        known = found.setdefault(entry.name, [])
        if entry.dist is not None and all(entry.dist.name != other.dist.name for other in known if other.dist):
            known.append(entry)
    plugins = {}
    for name, entries in found.items():
        if entries:
            first, *others = sorted(entries, key=lambda e: e.dist.name if e.dist else "")
            rivals = tuple(f"{e.dist.name} {e.dist.version}" for e in others if e.dist)
            assert first.dist is not None
            plugins[name] = Plugin(name, first.dist.name, first.dist.version, entry=first, rivals=rivals)
    return plugins


def import_plugin(plugin: Plugin) -> Any:
    """The plugin's module, or the object that was registered."""
    if plugin.entry is not None:
        return plugin.entry.load()
    return importlib.import_module(plugin.module) if isinstance(plugin.module, str) else plugin.module
