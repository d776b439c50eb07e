"""The host: finds plugins in the installed metadata, loads them one by one, and looks components up by name.

Names are looked up in the catalogue, and the plugins of the components that are used are imported, no others. A plugin
may fail to load, or break the contract of the hooks. That raises a `PluginError` if one of its components is needed,
and is ignored otherwise. `Host.check` lists every failure. There is no global plugin manager: a program may make its
own `Host`, and register objects on it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qsim_core.components.catalogue import Offer, catalogue, full_name, offers_of
from qsim_core.components.discovery import ACCELERATORS, GROUP, State, environment, import_plugin, in_one_line
from qsim_core.components.discovery import Plugin as Plugin
from qsim_core.components.discovery import installed as installed_entries
from qsim_core.errors import PluginError, QsimError, SpecError, described_as, did_you_mean, with_article
from qsim_core.version import __version__

if TYPE_CHECKING:
    from qsim_core.components.component import Component, Preset
    from qsim_core.components.syntax import Node

OF_TORCH = {"torch.int": "int32", "torch.short": "int16", "torch.float": "float32"}
"""The names of torch's dtypes that mean something else without `torch.`; any other means the same."""
ONLY_TORCH = re.compile("u?int64|uint32|u?int1|long|double|float64|bool|c(half|float|double)|complex[0-9]+|bits[0-9x]+")
"""The dtypes of torch that have no format. Names that look alike have other widths."""


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
        core = Plugin("core", "qsim-core", __version__, module="qsim_core.sites.core_components")
        found = installed_entries([GROUP, ACCELERATORS]) if discover else {GROUP: {}, ACCELERATORS: {}}
        self._plugins = {**found[GROUP], "core": core}
        self._accelerators = found[ACCELERATORS].keys()
        self._loaded: dict[str, Offers | PluginError] = {}
        self._catalogue: dict[str, list[Offer] | PluginError] = {}
        self._by_name: dict[str, list[Offer]] = {}
        self._of_kind: dict[type[Component], dict[str, list[Offer]]] = {}
        self._named: frozenset[str] = frozenset()

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

    def naming(self, plugins: Iterable[str]) -> Host:
        """This host, where a name that several plugins offer means the component of one of `plugins`.

        Raises `PluginError` for a plugin that is not installed.
        """
        host = copy.copy(self)
        host._named = frozenset(plugins)
        for name in sorted(host._named - self._plugins.keys()):
            raise PluginError(f"no plugin {name!r} is installed{did_you_mean(name, self._plugins)}")
        return host

    def check(self) -> dict[str, PluginError]:
        """Give the plugins that cannot be used, with the reasons."""
        return {name: found for name, found in self._described().items() if isinstance(found, PluginError)}

    def offers(self, kind: type[Component] | None = None) -> dict[str, list[Offer]]:
        """Every component class and preset of a kind by name, described: those of one name are sorted by plugin.

        No plugin is imported. Those of plugins that cannot be used are left out.
        """
        self._described()
        if kind is None:
            return self._by_name
        if kind not in self._of_kind:
            fitting = {name: [one for one in found if self._is(one, kind)] for name, found in self._by_name.items()}
            self._of_kind[kind] = {name: found for name, found in sorted(fitting.items()) if found}
        return self._of_kind[kind]

    def components(self, kind: type[Component] | None = None) -> dict[str, list[tuple[str, type[Component] | Preset]]]:
        """Every component class and preset of a kind by name: a list of (plugin, class or preset), sorted by plugin.

        Their plugins are imported; those of plugins that do not load are left out.
        """
        found: dict[str, list[tuple[str, type[Component] | Preset]]] = {}
        for name, offers in self.offers(kind).items():
            for offer in offers:
                with contextlib.suppress(PluginError):
                    found.setdefault(name, []).append((offer.plugin, self.get(offer)))
        return found

    def get(self, offer: Offer) -> type[Component] | Preset:
        """The class or the preset that an offer describes; its plugin is imported. Raises `PluginError`."""
        for item in self.load(offer.plugin).items():
            if item.name == offer.name:
                return item
        raise PluginError(f"{self._plugins[offer.plugin]} offers no {offer.name!r} here, but does so elsewhere")

    def _described(self) -> dict[str, list[Offer] | PluginError]:
        """The catalogue: installed plugins are described without being imported, others as they are."""
        missing = self._plugins.keys() - self._catalogue.keys()
        if missing:
            self._of_kind.clear()
        found = [self._plugins[name] for name in sorted(missing) if self._plugins[name].entry is not None]
        self._catalogue |= zip((plugin.name for plugin in found), catalogue(found), strict=True)
        for name in missing - self._catalogue.keys():
            try:
                self._catalogue[name] = offers_of(name, self.load(name).items())
            except PluginError as error:
                self._catalogue[name] = error
        for name in sorted(missing):
            described = self._catalogue[name]
            for offer in [] if isinstance(described, PluginError) else described:
                self._by_name.setdefault(offer.name, []).append(offer)
                self._by_name[offer.name].sort(key=lambda one: one.plugin)
        return self._catalogue

    def _is(self, offer: Offer, kind: type[Component]) -> bool:
        """Tell if an offer is of a kind: a class by its base classes, a preset by the class in its text."""
        target = self._target(offer)
        return kind.hook == "" if target is None else full_name(kind) in target.bases

    def _target(self, offer: Offer) -> Offer | None:
        """The class of an offer: itself, or the class in a preset's text; None for a text without one."""
        from qsim_core.components.syntax import read

        if offer.text is None:
            return offer
        try:
            plugin, _, bare = (read(offer.text).name or "").rpartition(".")
        except SpecError:  # building the preset reports this
            return None
        classes = [one for one in self._by_name.get(bare, []) if one.text is None and plugin in ("", one.plugin)]
        return next(iter(self.preferred(classes, self.scope(offer.plugin))), None)

    def preferred(self, offers: list[Offer], scope: frozenset[str] = frozenset()) -> list[Offer]:
        """The offers of plugins in a scope, by default those that `naming` was given; all of them if none is there."""
        return [offer for offer in offers if offer.plugin in (scope or self._named)] or offers

    def classes_without_search(self, kind: type[Component]) -> list[type[Component]]:
        """The component classes of this kind in registered plugins, and in plugins that are accelerators too.

        Only these plugins are imported. One that does not load is left out.
        """
        found: list[type[Component]] = []
        usable = self._plugins.keys() - self.check().keys()
        for name in sorted(usable):
            if self._plugins[name].entry is None or name in self._accelerators:
                with contextlib.suppress(PluginError):
                    offers = self.load(name).items()
                    found += [one for one in offers if isinstance(one, type) and issubclass(one, kind)]
        return found

    def find(self, name: str, kind: type[Component] | None = None) -> type[Component] | Preset:
        """Find the component class or the preset with this name, `name` or `plugin.name`.

        Raises `QsimError` if there is none of this kind, or if several plugins offer one.
        """
        return self.get(self._find(name, kind, frozenset()))

    def _find(self, name: str, kind: type[Component] | None, scope: frozenset[str]) -> Offer:
        """Find a class or preset with this name; of several plugins that offer one, the plugin in `scope`."""
        from qsim_core.components.component import Component

        kind, name = kind or Component, OF_TORCH.get(name, name.removeprefix("torch."))
        plugin, _, bare = name.rpartition(".")
        if plugin:
            candidates = [offer for offer in self._offers_of(plugin) if offer.name == bare]
        else:
            candidates = self.offers().get(bare, [])
        fitting = self.preferred([offer for offer in candidates if self._is(offer, kind)], scope)
        fitting = self._of_first_kind(fitting)
        if len(fitting) > 1:
            offering = " and ".join(str(self._plugins[offer.plugin]) for offer in fitting)
            choices = " or ".join(f"{offer.plugin}.{bare}" for offer in fitting)
            raise PluginError(f"{bare!r} is offered by {offering}; write {choices}")
        if fitting:
            return fitting[0]
        known = [found[0] for found in self.offers(kind).values()]
        if plugin:
            known = self._offers_of(plugin)
        descriptions = {offer.name: offer.doc for offer in known if offer.text is not None}
        if candidates and not described_as(bare, descriptions):
            found = self.class_of(self.get(candidates[0]))
            raise QsimError(f"{name!r} is {with_article(found.kind)}, not {with_article(kind.kind)}")
        failures = self.check()
        if bare in failures:  # the plugin with this name probably offers the component
            raise failures[bare]
        if ONLY_TORCH.fullmatch(bare):
            raise QsimError(
                f"no {kind.kind} {name!r}: qsim has no format like torch.{bare}; the widest are int32 and fp32"
            )
        hint = did_you_mean(bare, [offer.name for offer in known], descriptions)
        raise QsimError(f"no {kind.kind} {name!r}{hint}{self.not_looked_at()}")

    def _offers_of(self, plugin: str) -> list[Offer]:
        """The offers of a plugin that is named. Raises `PluginError` with the reason if it cannot be used."""
        self.load(plugin)
        described = self._described()[plugin]
        if isinstance(described, PluginError):
            raise described
        return described

    def _of_first_kind(self, offers: list[Offer]) -> list[Offer]:
        """Keep the offers of the first hook, in the order of `HOOKS`: `int8` is the format."""
        import qsim_core.components.hook_validation as hook_validation

        hooks = {self.hook_of(offer) for offer in offers}
        first = next((hook for hook in hook_validation.HOOKS if hook in hooks), "")
        return [offer for offer in offers if self.hook_of(offer) == first]

    def hook_of(self, offer: Offer) -> str:
        """The hook of an offer's class, which for a preset is that of the class in its text."""
        target = self._target(offer)
        return "" if target is None else target.hook

    @functools.cache  # noqa: B019 - a program makes few hosts
    def scope(self, plugin: str) -> frozenset[str]:
        """The plugins whose components a plugin may name: itself, the core, and its distribution's dependencies."""
        needed = self._plugins[plugin].requirements
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
            offer = self._find(node.name, kind, node.scope)
            found = self.get(offer)
        except PluginError:
            raise
        except QsimError as error:
            raise node.error(str(error)) from None
        unique = sum(self.hook_of(other) == self.hook_of(offer) for other in self.offers()[offer.name]) == 1
        name = offer.name if unique else f"{offer.plugin}.{offer.name}"
        scope = self.scope(offer.plugin)
        if not isinstance(found, Preset):
            component = construct(found, node, self, scope)
            return component if unique else component._named(name)
        definition = read(found.text, scope)
        try:
            preset = self.build(definition, kind)._named(name, preset_of=offer.plugin)
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

    def plugins_of(self, component: Component) -> list[Plugin]:
        """The loaded plugins that offer this component's class, and the preset that it is written by."""
        found = (self.plugin_of(component), self._plugins.get(component.preset_of or ""))
        return [plugin for plugin in found if plugin is not None]

    def class_of(self, offered: type[Component] | Preset) -> type[Component]:
        """The class of a preset's component; a component class is returned as it is."""
        from qsim_core.components.component import Component, Preset

        if not isinstance(offered, Preset):
            return offered
        for offer in self.offers().get(offered.name, []):
            if offer.text == offered.text and (target := self._target(offer)) is not None:
                cls = self.get(target)
                return cls if isinstance(cls, type) else Component
        return Component

    @staticmethod
    def _collect(plugin: Plugin) -> Offers:
        """Import a plugin and collect its components. Raises `PluginError` if that fails for any reason."""
        import qsim_core.components.hook_validation as hook_validation

        module = import_plugin(plugin)
        try:
            return Offers(plugin, hook_validation.offers(plugin, module))
        except (PluginError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise PluginError(f"{plugin}: {in_one_line(error)}; {plugin.remedy}") from error


def installed() -> Host:
    """The host of the installed plugins, made once and again after an installation; `qsim_core.parse` uses it."""
    return _installed(environment())


@functools.lru_cache(maxsize=2)
def _installed(_: tuple[State, ...]) -> Host:
    return Host()


def parse(text: str, host: Host | None = None) -> Any:
    """Build the component that a text describes: `parse("abfp(int4, n=64)")`.

    `host` is the set of components that exist, by default those of the installed plugins. Raises `SpecError`, with
    the position of the character, for a text that cannot be read or built. Raises `PluginError` if a plugin that the
    text names is broken.
    """
    return (host or installed()).parse(text)
