"""The catalogue: the names that each installed plugin offers, so that a name is looked up without an import.

A plugin is imported in a process of its own to describe it, and the description is kept in the user's cache. It is
made again when the files of the plugin's module or of the core change. That a plugin cannot be imported is forgotten
when anything is installed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

from qsim_core.components.discovery import GROUP, Plugin, State, environment, import_plugin, state_of
from qsim_core.components.plugin_process import ask
from qsim_core.errors import PluginError, QsimError
from qsim_core.files import cache, make_cache_folder, read_checked, write_checked

FOLDER = "plugins"
"""The folder of descriptions in the user's cache."""


@dataclass(frozen=True)
class Offer:
    """A component class or a preset as the host knows it before its plugin is imported."""

    plugin: str
    name: str
    hook: str
    bases: tuple[str, ...] = ()
    """The full names of the class and its base classes; none: a preset."""
    text: str | None = None
    """The text that a preset stands for."""
    doc: str = ""
    stands_for_bits: int | None = None
    families: tuple[str, ...] = ()
    """The families that an adapter loads besides the one that it is named after."""
    endings: tuple[str, ...] = ()
    """The endings of the files that an adapter loads, each a whole model."""
    fallback: bool = False
    models: dict[str, bool] = field(default_factory=dict)
    """The models that an adapter knows by name; true for the default model."""


def offers_of(plugin: str, offered: Iterable[Any]) -> list[Offer]:
    """Describe component classes and presets. Raises `PluginError` for an adapter whose models cannot be listed."""
    from qsim_core.components.component import Preset

    return [
        Offer(plugin, one.name, "qsim_quantizers", (), one.text, one.doc, one.stands_for_bits)
        if isinstance(one, Preset)
        else Offer(
            plugin,
            one.name,
            one.hook,
            tuple(full_name(base) for base in one.__mro__),
            families=tuple(getattr(one, "families", ())),
            endings=tuple(getattr(one, "endings", ())),
            fallback=bool(getattr(one, "fallback", False)),
            models={str(name): bool(model.is_default) for name, model in one().models().items()}
            if hasattr(one, "models")
            else {},
        )
        for one in offered
    ]


def full_name(cls: type) -> str:
    """The name of a class with its module's."""
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(subject: dict[str, Any]) -> list[dict[str, Any]]:
    """Import a plugin and describe what it offers, as plain data; nothing but components can be described."""
    from qsim_core.components import hook_validation

    entry = EntryPoint(subject["name"], subject["value"], subject["group"])
    plugin = Plugin(entry.name, subject["distribution"], subject["version"], entry=entry, group=entry.group)
    module = import_plugin(plugin)
    if plugin.group != GROUP:
        return []
    offered = hook_validation.offers(plugin, module).values()
    try:
        return [asdict(offer) for offer in offers_of(plugin.name, [one for ones in offered for one in ones])]
    except Exception as error:
        raise PluginError(f"{plugin}: {type(error).__name__}: {error}; {plugin.remedy}") from error


def subject(plugin: Plugin) -> dict[str, str]:
    """A plugin as plain data, for `ask`."""
    value = plugin.entry.value if plugin.entry is not None else ""
    return {
        "name": plugin.name,
        "group": plugin.group,
        "value": value,
        "distribution": plugin.distribution,
        "version": plugin.version,
    }


def catalogue(plugins: Sequence[Plugin], again: bool = False) -> list[list[Offer] | PluginError]:
    """Describe installed plugins: the offers of each, or the reason why it cannot be used.

    With `again` they are described anew, and not from the cache.
    """
    found = [PluginError(plugin.fault) if plugin.fault else None if again else _kept(plugin) for plugin in plugins]
    unknown = [plugin for plugin, described in zip(plugins, found, strict=True) if described is None]
    answers = ask(describe, [subject(plugin) for plugin in unknown]) if unknown else []
    made = iter([_keep(plugin, answer) for plugin, answer in zip(unknown, answers, strict=True)])
    return [next(made) if described is None else described for described in found]


def _offers(described: list[dict[str, Any]]) -> list[Offer]:
    tuples: list[Any] = [{key: tuple(v) if isinstance(v, list) else v for key, v in one.items()} for one in described]
    return [Offer(**one) for one in tuples]


_known: dict[str, list[Offer] | PluginError] = {}
"""The descriptions that this process has, by digest."""


def _kept(plugin: Plugin) -> list[Offer] | PluginError | None:
    """The description in the cache; None where there is none, where it is damaged, or where it has to be made again."""
    digest = _digest(plugin)
    if digest not in _known:
        try:
            content = read_checked(cache() / FOLDER / f"{digest}.json", own=True)
        except RuntimeError:  # there is no home directory
            return None
        if content is None:
            return None
        before, fault, described = json.loads(content)
        if fault is not None and before != _environment():
            return None
        _known[digest] = _offers(described) if fault is None else PluginError(fault)
    return _known[digest]


def _keep(plugin: Plugin, answer: list[dict[str, Any]] | PluginError) -> list[Offer] | PluginError:
    """Keep a description in this process and, where there is room, in the user's cache."""
    if isinstance(answer, PluginError) and not answer.args[0].startswith(f"{plugin}"):
        answer = PluginError(f"{plugin} does not import: {answer}; {plugin.remedy}")
    digest = _digest(plugin)
    _known[digest] = answer if isinstance(answer, PluginError) else _offers(answer)
    kept = (
        [_sha256(json.dumps(environment())), str(answer), []] if isinstance(answer, PluginError) else ["", None, answer]
    )
    with contextlib.suppress(OSError, QsimError, RuntimeError):
        write_checked(
            make_cache_folder(FOLDER, "what each installed plugin offers") / f"{digest}.json", json.dumps(kept).encode()
        )
    return _known[digest]


def _digest(plugin: Plugin) -> str:
    """A digest of everything that a description is made from: the entry point, and the files of its module."""
    return _sha256(json.dumps([subject(plugin), sys.version, _files_of_core(), _files(subject(plugin)["value"])]))[:16]


@functools.cache
def _files_of_core() -> list[State]:
    return _files("qsim_core")


def _files(module: str) -> list[State]:
    """The source files of a module's top package, with sizes and times."""
    try:
        spec = importlib.util.find_spec(module.partition(":")[0].partition(".")[0].strip())
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    walks = [step for folder in spec.submodule_search_locations or () for step in os.walk(folder)]
    files = [os.path.join(folder, name) for folder, _, names in walks for name in names if name.endswith(".py")]
    return [state_of(path) for path in sorted(files or [spec.origin or ""])]


def _environment() -> str:
    return _sha256(json.dumps(environment()))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
