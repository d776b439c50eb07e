"""Finding the distributions that extend qsim by their installed metadata, without an import of any."""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions
from typing import Any

from qsim_core.errors import PluginError, QsimError

GROUP = "qsim"
"""The entry-point group of modules with hooks."""
COMMANDS = "qsim.commands"
"""The entry-point group of click commands."""
ACCELERATORS = "qsim.accelerators"
"""The entry-point group of accelerators."""
FUNCTIONS = "qsim.functions"
"""The entry-point group of functions that plugins add to `qsim_core`. The core itself calls some of them."""
GROUPS = {GROUP: "plugin", COMMANDS: "command", ACCELERATORS: "accelerator", FUNCTIONS: "function"}
"""Each entry-point group, and the noun for its entry points in messages."""
RESERVED = frozenset({"core", "inline"})
"""Names of plugins that no distribution may take: the core's own, and the default of `Host.register`."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")


@dataclass(frozen=True)
class Plugin:
    """An entry point in the installed metadata, or an object that `Host.register` was given. It may fail to load."""

    name: str
    distribution: str
    version: str
    entry: EntryPoint | None = None
    module: Any = None
    rivals: tuple[tuple[str, str], ...] = ()
    """Other distributions that claim the same name, with their versions."""
    group: str = GROUP

    def __str__(self) -> str:
        return f"{self.noun} {self.name!r} ({self.distribution} {self.version})"

    @property
    def noun(self) -> str:
        """The kind of entry point, for messages: a plugin, a command or an accelerator."""
        return GROUPS[self.group]

    @property
    def claims(self) -> tuple[tuple[str, str], ...]:
        """Every distribution that claims this name, with its version."""
        return ((self.distribution, self.version), *self.rivals)

    @property
    def claimants(self) -> str:
        """The text of `claims` for messages."""
        return " and ".join(f"{distribution} {version}" for distribution, version in self.claims)

    @property
    def fault(self) -> str:
        """The reason why a plugin of this name is not imported, for messages; empty: there is none."""
        if self.rivals:
            return f"{self.noun} {self.name!r} is claimed by {self.claimants}; uninstall all but one of them"
        if self.group == GROUP and self.entry is not None and self.name in RESERVED:
            return f"{self}: the name {self.name!r} is qsim's own; {self.remedy}"
        if not NAME.match(self.name):
            return f"{self}: a name has letters, digits, _ and -; {self.remedy}"
        return ""

    @functools.cached_property
    def requirements(self) -> frozenset[str]:
        """The names of the distributions that its own distribution requires, in lower case."""
        requires = self.entry.dist.requires if self.entry is not None and self.entry.dist is not None else None
        return frozenset(re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in requires or [])

    @property
    def remedy(self) -> str:
        """The advice for a distribution that does not load, for messages."""
        return f"reinstall or upgrade {self.distribution}, or uninstall it"


def installed(groups: Collection[str]) -> dict[str, dict[str, Plugin]]:
    """The entry points of each group by name. No plugin is imported.

    The metadata are read again when `environment` has changed.
    """
    found = _found(environment())
    return {group: dict(found[group]) for group in groups}


State = tuple[str, int, int]


def environment() -> tuple[State, ...]:
    """The directories of modules with sizes and times, which change when something is installed.

    Files come and go in the working directory, so its time does not count.
    """
    try:
        here = os.getcwd()
    except OSError:  # it was deleted
        here = ""
    return tuple((here, 0, 0) if place in ("", here) else state_of(place) for place in sys.path)


def state_of(path: str) -> State:
    """A path with its size and time in nanoseconds; zeros for one that is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _found(_: tuple[State, ...]) -> dict[str, dict[str, Plugin]]:
    """The entry points of all groups.

    Most distributions have none for qsim. Their metadata are only searched for the name of a group, which takes half
    the time of `importlib.metadata.entry_points`.
    """
    claims: dict[str, dict[str, dict[str, tuple[str, EntryPoint]]]] = {group: {} for group in GROUPS}
    for distribution in distributions():
        text = distribution.read_text("entry_points.txt")
        if text is None or GROUP not in text:
            continue
        described = distribution.metadata  # read and parsed at each access
        name, version = described["Name"] or "an unnamed distribution", described["Version"] or ""
        for entry in distribution.entry_points:
            if entry.group in claims:
                claims[entry.group].setdefault(entry.name, {}).setdefault(name, (version, entry))
    return {
        group: {name: _plugin(group, name, claim) for name, claim in names.items()} for group, names in claims.items()
    }


def added(name: str, purpose: str) -> Any:
    """Give the function of this name that a plugin adds to the core. Raises `QsimError` if no plugin does so.

    `purpose` says in the message what the function is for, like "keeps the work directory work".
    """
    if (plugin := functions().get(name)) is not None:
        return import_plugin(plugin)
    raise QsimError(f"no plugin {purpose}; pip install 'qsim-core[all]'")


def functions() -> dict[str, Plugin]:
    """Find the functions that plugins add to the core, by name."""
    return installed([FUNCTIONS])[FUNCTIONS]


def _plugin(group: str, name: str, claim: dict[str, tuple[str, EntryPoint]]) -> Plugin:
    """Make a plugin from the versions and entry points with its name, by distribution. All but the first are rivals."""
    (distribution, (version, entry)), *others = sorted(claim.items())
    rivals = tuple((other, its_version) for other, (its_version, _) in others)
    return Plugin(name, distribution, version, entry=entry, rivals=rivals, group=group)


def import_plugin(plugin: Plugin) -> Any:
    """Import the plugin's module, command or accelerator. Raises `PluginError` with cause and remedy."""
    if plugin.fault:
        raise PluginError(plugin.fault)
    try:
        if plugin.entry is not None:
            return plugin.entry.load()
        if isinstance(plugin.module, str):
            return importlib.import_module(plugin.module)
        return plugin.module
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise PluginError(f"{plugin} does not import: {in_one_line(error)}; {plugin.remedy}") from error


def in_one_line(error: BaseException) -> str:
    """The type and the message of an error, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
