"""The host: finds plugins in the installed metadata, loads them one by one, and looks components up by name.

Finding imports nothing. A plugin that fails to load, or offers nonsense, is a `PluginError` for whoever needs
it and nobody else's concern; `Host.check` lists every failure. There is no global plugin manager: an embedder
makes a `Host` of its own and may register inline objects on it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qsim_core.components.default_host import set_default_host
from qsim_core.components.discovery import Plugin as Plugin
from qsim_core.components.discovery import import_plugin, in_one_line, installed_plugins
from qsim_core.errors import PluginError, QsimError, SpecError, did_you_mean, with_article

if TYPE_CHECKING:
    from qsim_core.components.component import Component, Preset
    from qsim_core.components.syntax import Node


@dataclass(frozen=True)
class Offers:
    """What one plugin offers, by hook, and under which names."""

    plugin: Plugin
    offers: dict[str, list[type[Component] | Preset]] = field(default_factory=dict)

    def items(self) -> Iterator[type[Component] | Preset]:
        for offered in self.offers.values():
            yield from offered


class Host:
    """A set of plugins and the components they offer.

    `Host()` knows what is installed; `Host(discover=False)` knows the core's own schemes only.
    """

    def __init__(self, *, discover: bool = True) -> None:
        core = Plugin("core", "qsim-core", _core_version(), module="qsim_core.sites.core_components")
        self._plugins = {"core": core, **(installed_plugins() if discover else {})}
        self._loaded: dict[str, Offers | PluginError] = {}
        self._everything: dict[str, list[tuple[str, type[Component] | Preset]]] | None = None

    @property
    def plugins(self) -> dict[str, Plugin]:
        """Every plugin by name, sorted; none is imported for it."""
        return dict(sorted(self._plugins.items()))

    def register(self, *objects: Any, name: str = "inline") -> None:
        """Add components, presets, or one object with hooks, without installing anything.

        Raises `PluginError` at once for what could not be used later.
        """
        from qsim_core.components import hook_validation

        module = (
            objects[0]
            if len(objects) == 1 and hook_validation.has_hooks(objects[0])
            else hook_validation.inline(objects)
        )
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
        """Import one plugin and collect what it offers, once. Raises `PluginError` if that fails."""
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
        """Load every plugin; the failures by plugin name."""
        failures = {}
        for name in self.plugins:
            try:
                self.load(name)
            except PluginError as error:
                failures[name] = error
        return failures

    def verify(self) -> dict[str, PluginError]:
        """`check`, and every preset built besides."""
        failures = self.check()
        for name, found in self.components().items():
            for plugin, offered in found:
                try:
                    if not isinstance(offered, type):
                        self.parse(f"{plugin}.{name}")
                except QsimError as error:
                    failures.setdefault(plugin, PluginError(f"{self._plugins[plugin]}: {error}"))
        return failures

    def components(self, kind: type[Component] | None = None) -> dict[str, list[tuple[str, type[Component] | Preset]]]:
        """Every component and preset that loads, by name: a list of (plugin, what it offers), sorted."""
        if self._everything is None:
            found: dict[str, list[tuple[str, type[Component] | Preset]]] = {}
            failures = self.check()
            for plugin in self.plugins.keys() - failures.keys():
                for offered in self.load(plugin).items():
                    found.setdefault(offered.name, []).append((plugin, offered))
            self._everything = {name: sorted(found[name], key=lambda pair: pair[0]) for name in sorted(found)}
        if kind is None:
            return dict(self._everything)
        fitting = {n: [o for o in f if issubclass(self.class_of(o[1]), kind)] for n, f in self._everything.items()}
        return {name: offered for name, offered in fitting.items() if offered}

    def find(self, name: str, kind: type[Component] | None = None) -> type[Component] | Preset:
        """What a name means. Raises `QsimError` if it means nothing of this kind here, or more than one thing."""
        return self._find(name, kind, frozenset())[1]

    def _find(
        self, name: str, kind: type[Component] | None, scope: frozenset[str]
    ) -> tuple[str, type[Component] | Preset]:
        """The plugin and what it offers under a name; of several, the one in `scope`."""
        from qsim_core.components.component import Component, Preset

        kind = kind or Component
        plugin, _, bare = name.rpartition(".")
        if plugin:
            candidates = [(plugin, item) for item in self.load(plugin).items() if item.name == bare]
        else:
            candidates = self.components().get(bare, [])
        fitting = [(p, o) for p, o in candidates if issubclass(self.class_of(o), kind)]
        fitting = self._of_first_kind(fitting)
        if len(fitting) > 1:
            meant = [(p, o) for p, o in fitting if p in scope]
            fitting = meant if len(meant) == 1 else fitting
        if len(fitting) > 1:
            offering = " and ".join(str(self._plugins[p]) for p, _ in fitting)
            choices = " or ".join(f"{p}.{bare}" for p, _ in fitting)
            raise PluginError(f"{bare!r} is offered by {offering}; write {choices}")
        if fitting:
            return fitting[0]
        if candidates:
            raise QsimError(
                f"{name!r} is {with_article(self.class_of(candidates[0][1]).kind)}, not {with_article(kind.kind)}"
            )
        failures = self.check()
        if bare in failures:  # the plugin of that name may well offer it
            raise failures[bare]
        known = list(self.load(plugin).items()) if plugin else [of for [(_, of), *_] in self.components(kind).values()]
        words = {of.name: of.doc for of in known if isinstance(of, Preset)}
        hint = did_you_mean(bare, [of.name for of in known], words)
        raise QsimError(f"no {kind.kind} {name!r}{hint}{self.not_looked_at()}")

    def _of_first_kind(
        self, offers: list[tuple[str, type[Component] | Preset]]
    ) -> list[tuple[str, type[Component] | Preset]]:
        """Of offers of several kinds under one name, those whose hook comes first: `int8` is the format."""
        from qsim_core.components import hook_validation

        hooks = {self.class_of(offered).hook for _, offered in offers}
        first = next((hook for hook in hook_validation.HOOKS if hook in hooks), "")
        return [(plugin, offered) for plugin, offered in offers if self.class_of(offered).hook == first]

    def scope(self, plugin: str) -> frozenset[str]:
        """A plugin, the core, and the plugins among its distribution's dependencies: what its author relies on."""
        known = self._plugins[plugin]
        requires = (known.entry.dist.requires or []) if known.entry is not None and known.entry.dist is not None else []
        needed = {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in requires}
        return frozenset(
            {plugin, "core", *(p.name for p in self._plugins.values() if p.distribution.lower() in needed)}
        )

    def not_looked_at(self) -> str:
        """The plugins that do not load and why, as the end of a message that something was not found."""
        failures = self.check()
        return f" (not looked at: {'; '.join(str(failures[name]) for name in sorted(failures))})" if failures else ""

    def build(self, node: Node, kind: type[Component] | None = None) -> Component:
        """The component that a piece of text describes. Raises `SpecError`, pointing at the character."""
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
        alone = sum(self.class_of(o).hook == hook for _, o in self.components().get(found.name, ())) == 1
        name = found.name if alone else f"{plugin}.{found.name}"
        scope = self.scope(plugin)
        if not isinstance(found, Preset):
            made = construct(found, node, self, scope)
            return made if alone else made._named(name)
        written = read(found.text, scope)
        try:
            preset = self.build(written, kind)._named(name, preset=True)
        except SpecError as error:
            raise PluginError(f"preset {found.name!r} cannot be built: {error}") from error
        if node.arguments:
            raise node.arguments[0].error(f"{node.name!r} is short for {found.text}; name the option to change")
        if not node.options:
            return preset
        return self.build(replace(written, options={**written.options, **node.options}), kind)

    def parse(self, text: str, kind: type[Component] | None = None) -> Any:
        """The component that a text describes, of the kind asked for."""
        from qsim_core.components.syntax import read

        return self.build(read(text), kind)

    def plugin_of(self, component: Component) -> Plugin | None:
        """The plugin that offers this component's class, if one that was loaded does."""
        for result in self._loaded.values():
            if isinstance(result, Offers) and type(component) in result.items():
                return result.plugin
        return None

    def class_of(self, offered: type[Component] | Preset) -> type[Component]:
        """The class of what is offered; for a preset that of the component it names."""
        from qsim_core.components.component import Component, Preset
        from qsim_core.components.syntax import read

        if not isinstance(offered, Preset):
            return offered
        try:
            plugin, _, bare = (read(offered.text).name or "").rpartition(".")
        except SpecError:  # whoever asks for the preset itself is told
            return Component
        for where, target in self.components().get(bare, []):
            if where == (plugin or where) and not isinstance(target, Preset):
                return target
        return Component

    @staticmethod
    def _collect(plugin: Plugin) -> Offers:
        from qsim_core.components import hook_validation

        module = import_plugin(plugin)
        try:
            return Offers(plugin, hook_validation.offers(plugin, module))
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(f"{plugin}: {in_one_line(error)}; {plugin.remedy}") from error


@functools.cache
def installed() -> Host:
    """The host of what is installed, which `qsim_core.parse` uses when it is given none."""
    return Host()


def _core_version() -> str:
    from qsim_core.version import __version__

    return __version__


set_default_host(installed)
