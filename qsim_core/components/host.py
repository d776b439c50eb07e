"""The host: finds plugins in the installed metadata, loads them one by one, and looks components up by name.

Finding imports nothing. A plugin may fail to load, or break the contract of the hooks. That raises a `PluginError` if
one of its components is needed, and is ignored otherwise. `Host.check` lists every failure. There is no global plugin
manager: a program may make its own `Host`, and register objects on it.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qsim_core.components.default_host import set_default_host
from qsim_core.components.discovery import ACCELERATORS, GROUP, import_plugin, in_one_line
from qsim_core.components.discovery import Plugin as Plugin
from qsim_core.components.discovery import installed as installed_entries
from qsim_core.errors import PluginError, QsimError, SpecError, described_as, did_you_mean, with_article

if TYPE_CHECKING:
    from qsim_core.components.component import Component, Preset
    from qsim_core.components.syntax import Node


@dataclass(frozen=True)
class Offers:
    """The component classes and presets that one plugin offers, by hook."""

    plugin: Plugin
    offers: dict[str, list[type[Component] | Preset]] = field(default_factory=dict)

    def items(self) -> Iterator[type[Component] | Preset]:
        """All of them, of every hook."""
        for offered in self.offers.values():
            yield from offered


class Host:
    """A set of plugins, and the components that they offer.

    `Host()` has the installed plugins and the core's own components; `Host(discover=False)` has only the latter.
    """

    def __init__(self, *, discover: bool = True) -> None:
        core = Plugin("core", "qsim-core", _core_version(), module="qsim_core.sites.core_components")
        found = installed_entries([GROUP, ACCELERATORS]) if discover else {GROUP: {}, ACCELERATORS: {}}
        self._plugins = {"core": core, **found[GROUP]}
        self._accelerators = found[ACCELERATORS].keys()
        self._loaded: dict[str, Offers | PluginError] = {}
        self._everything: dict[str, list[tuple[str, type[Component] | Preset]]] | None = None

    @property
    def plugins(self) -> dict[str, Plugin]:
        """Every plugin by name, sorted. No plugin is imported."""
        return dict(sorted(self._plugins.items()))

    def register(self, *objects: Any, name: str = "inline") -> None:
        """Add component classes, presets, or one object with hooks, without an installation.

        Raises `PluginError` if the plugin's name is taken, or an object cannot be used.
        """
        import qsim_core.components.hook_validation as hook_validation

        has_hooks = len(objects) == 1 and hook_validation.has_hooks(objects[0])
        module = objects[0] if has_hooks else hook_validation.inline(objects)
        if name in self._plugins:
            raise PluginError(f"a plugin named {name!r} is there already; give register() another name=")
        self._plugins[name] = Plugin(name, "inline", "0", module=module)
        self._everything = None
        try:
            self.load(name)
        except PluginError:
            del self._plugins[name], self._loaded[name]
            raise

    def load(self, name: str) -> Offers:
        """Import one plugin and collect its components, once. Raises `PluginError` if that fails."""
        if name not in self._plugins:
            raise PluginError(f"no plugin {name!r} is installed{did_you_mean(name, self._plugins)}")
        if name not in self._loaded:
            try:
                self._loaded[name] = self._collect(self._plugins[name])
            except PluginError as error:
                self._loaded[name] = error
        result = self._loaded[name]
        if isinstance(result, PluginError):
            raise result
        return result

    def check(self) -> dict[str, PluginError]:
        """Load every plugin, and give the failures by plugin name."""
        failures = {}
        for name in self.plugins:
            try:
                self.load(name)
            except PluginError as error:
                failures[name] = error
        return failures

    def verify(self) -> dict[str, PluginError]:
        """Load every plugin and build every preset, and give the failures by plugin name."""
        failures = self.check()
        for name, found in self.components().items():
            for plugin, offered in found:
                if isinstance(offered, type):
                    continue
                try:
                    self.parse(f"{plugin}.{name}")
                except QsimError as error:
                    failures.setdefault(plugin, PluginError(f"{self._plugins[plugin]}: {error}"))
        return failures

    def components(self, kind: type[Component] | None = None) -> dict[str, list[tuple[str, type[Component] | Preset]]]:
        """Every component class and preset by name: a list of (plugin, class or preset), sorted by plugin.

        Those of plugins that do not load are left out. With `kind`, only components of this kind are listed.
        """
        if self._everything is None:
            found: dict[str, list[tuple[str, type[Component] | Preset]]] = {}
            failures = self.check()
            for plugin in self.plugins.keys() - failures.keys():
                for offered in self.load(plugin).items():
                    found.setdefault(offered.name, []).append((plugin, offered))
            self._everything = {name: sorted(found[name], key=lambda pair: pair[0]) for name in sorted(found)}
        if kind is None:
            return dict(self._everything)
        fitting = {}
        for name, found_here in self._everything.items():
            of_kind = [(plugin, offered) for plugin, offered in found_here if issubclass(self.class_of(offered), kind)]
            if of_kind:
                fitting[name] = of_kind
        return fitting

    def classes_without_search(self, kind: type[Component]) -> list[type[Component]]:
        """The component classes of this kind in registered plugins, and in plugins that are accelerators too.

        Only these plugins are imported. One that does not load is left out.
        """
        found: list[type[Component]] = []
        for name, plugin in self.plugins.items():
            if plugin.entry is None or name in self._accelerators:
                with contextlib.suppress(PluginError):
                    offers = self.load(name).items()
                    found += [one for one in offers if isinstance(one, type) and issubclass(one, kind)]
        return found

    def find(self, name: str, kind: type[Component] | None = None) -> type[Component] | Preset:
        """Find the component class or the preset with this name, `name` or `plugin.name`.

        Raises `QsimError` if there is none of this kind, or if several plugins offer one.
        """
        return self._find(name, kind, frozenset())[1]

    def _find(
        self, name: str, kind: type[Component] | None, scope: frozenset[str]
    ) -> tuple[str, type[Component] | Preset]:
        """Find a plugin and its class or preset with this name; of several plugins, the one in `scope`."""
        from qsim_core.components.component import Component, Preset

        kind = kind or Component
        plugin, _, bare = name.rpartition(".")
        if plugin:
            candidates = [(plugin, item) for item in self.load(plugin).items() if item.name == bare]
        else:
            candidates = self.components().get(bare, [])
        fitting = self._of_first_kind([pair for pair in candidates if issubclass(self.class_of(pair[1]), kind)])
        if len(fitting) > 1:
            in_scope = [pair for pair in fitting if pair[0] in scope]
            if len(in_scope) == 1:
                fitting = in_scope
        if len(fitting) > 1:
            offering = " and ".join(str(self._plugins[other]) for other, _ in fitting)
            choices = " or ".join(f"{other}.{bare}" for other, _ in fitting)
            raise PluginError(f"{bare!r} is offered by {offering}; write {choices}")
        if fitting:
            return fitting[0]
        known = [found[0][1] for found in self.components(kind).values()]
        if plugin:
            known = list(self.load(plugin).items())
        descriptions = {offered.name: offered.doc for offered in known if isinstance(offered, Preset)}
        if candidates and not described_as(bare, descriptions):
            raise QsimError(
                f"{name!r} is {with_article(self.class_of(candidates[0][1]).kind)}, not {with_article(kind.kind)}"
            )
        failures = self.check()
        if bare in failures:  # the plugin with this name probably offers the component
            raise failures[bare]
        hint = did_you_mean(bare, [offered.name for offered in known], descriptions)
        raise QsimError(f"no {kind.kind} {name!r}{hint}{self.not_looked_at()}")

    def _of_first_kind(
        self, offers: list[tuple[str, type[Component] | Preset]]
    ) -> list[tuple[str, type[Component] | Preset]]:
        """Keep the classes and presets of the first hook, in the order of `HOOKS`: `int8` is the format."""
        import qsim_core.components.hook_validation as hook_validation

        hooks = {self.class_of(offered).hook for _, offered in offers}
        first = next((hook for hook in hook_validation.HOOKS if hook in hooks), "")
        return [(plugin, offered) for plugin, offered in offers if self.class_of(offered).hook == first]

    def scope(self, plugin: str) -> frozenset[str]:
        """The plugins whose components a plugin may name: itself, the core, and its distribution's dependencies."""
        entry = self._plugins[plugin].entry
        requires = entry.dist.requires if entry is not None and entry.dist is not None else None
        needed = {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in requires or []}
        dependencies = (other.name for other in self._plugins.values() if other.distribution.lower() in needed)
        return frozenset({plugin, "core", *dependencies})

    def not_looked_at(self) -> str:
        """The plugins that do not load, with the reasons, as the end of a message that a name was not found."""
        failures = self.check()
        if not failures:
            return ""
        return f" (not searched: {'; '.join(str(failures[name]) for name in sorted(failures))})"

    def build(self, node: Node, kind: type[Component] | None = None) -> Component:
        """Build the component that a piece of text describes. Raises `SpecError` with the position of the fault."""
        from qsim_core.components.component import Component, Preset, construct
        from qsim_core.components.syntax import read

        if node.name is None:
            what = "a list" if isinstance(node.value, list) else repr(node.value)
            raise node.error(f"expected {with_article((kind or Component).kind)}, found {what}")
        try:
            plugin, found = self._find(node.name, kind, node.scope)
        except PluginError:
            raise
        except QsimError as error:
            raise node.error(str(error)) from None
        hook = self.class_of(found).hook
        same_name = [offered for _, offered in self.components().get(found.name, ())]
        unique = sum(self.class_of(offered).hook == hook for offered in same_name) == 1
        name = found.name if unique else f"{plugin}.{found.name}"
        scope = self.scope(plugin)
        if not isinstance(found, Preset):
            component = construct(found, node, self, scope)
            return component if unique else component._named(name)
        definition = read(found.text, scope)
        try:
            preset = self.build(definition, kind)._named(name, preset=True)
        except SpecError as error:
            raise PluginError(f"preset {found.name!r} cannot be built: {error}") from error
        if node.arguments:
            raise node.arguments[0].error(f"{node.name!r} is short for {found.text}; name the option to change")
        if not node.options:
            return preset
        return self.build(replace(definition, options={**definition.options, **node.options}), kind)

    def parse(self, text: str, kind: type[Component] | None = None) -> Any:
        """Build the component that a text describes, which has to be of this kind. Raises as `qsim_core.parse`."""
        from qsim_core.components.syntax import read

        return self.build(read(text), kind)

    def plugin_of(self, component: Component) -> Plugin | None:
        """The loaded plugin that offers this component's class; None if there is none."""
        for result in self._loaded.values():
            if isinstance(result, Offers) and type(component) in result.items():
                return result.plugin
        return None

    def class_of(self, offered: type[Component] | Preset) -> type[Component]:
        """The class of a preset's component; a component class is returned as it is."""
        from qsim_core.components.component import Component, Preset
        from qsim_core.components.syntax import read

        if not isinstance(offered, Preset):
            return offered
        try:
            plugin, _, bare = (read(offered.text).name or "").rpartition(".")
        except SpecError:  # building the preset reports this
            return Component
        for other, target in self.components().get(bare, []):
            if other == (plugin or other) and not isinstance(target, Preset):
                return target
        return Component

    @staticmethod
    def _collect(plugin: Plugin) -> Offers:
        """Import a plugin and collect its components. Raises `PluginError` if that fails for any reason."""
        import qsim_core.components.hook_validation as hook_validation

        module = import_plugin(plugin)
        try:
            return Offers(plugin, hook_validation.offers(plugin, module))
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(f"{plugin}: {in_one_line(error)}; {plugin.remedy}") from error


@functools.cache
def installed() -> Host:
    """The host of the installed plugins, made once; `qsim_core.parse` uses it by default."""
    return Host()


def _core_version() -> str:
    from qsim_core.version import __version__

    return __version__


set_default_host(installed)
