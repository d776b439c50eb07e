"""The distributions that extend qsim, and what each of them provides, from the installed metadata alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qsim_core.errors import natural_order


@dataclass(frozen=True)
class Row:
    """One name of one distribution, and what it provides under that name."""

    name: str
    distribution: str
    version: str
    provides: tuple[str, ...]


def rows() -> list[Row]:
    """Every name that a distribution has in one of the entry-point groups, sorted. Nothing is imported."""
    from qsim_core.components.discovery import ACCELERATORS, COMMANDS, GROUP, installed
    from qsim_core.components.host import Host

    groups = installed((GROUP, COMMANDS, ACCELERATORS))
    core = Host(discover=False).plugins["core"]
    found: dict[tuple[str, str, str], list[str]] = {(core.name, core.distribution, core.version): ["components"]}
    for group, what in {GROUP: "components", COMMANDS: "command", ACCELERATORS: "accelerator"}.items():
        for plugin in groups[group].values():
            for claimant in plugin.claims:
                found.setdefault((plugin.name, *claimant), []).append(what)
    in_order = sorted(found.items(), key=lambda row: [natural_order(part) for part in row[0]])
    return [Row(*key, tuple(provides)) for key, provides in in_order]


def lines(found: Collection[Row]) -> list[str]:
    """Name, distribution, version and what is provided, in columns."""
    columns = [(_shown(row.name), row.distribution, row.version, ", ".join(row.provides)) for row in found]
    widths = [max(len(column[i]) for column in columns) for i in range(3)]
    return ["  ".join(f"{text:{width}}" for text, width in zip(c, (*widths, 0), strict=True)) for c in columns]


def _shown(name: str) -> str:
    """A name as it is printed: what a terminal would obey is written as an escape."""
    return name if name.isprintable() else ascii(name)[1:-1]
