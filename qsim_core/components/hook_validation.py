"""The contract between the host and a plugin: the names of the hooks, and the values that they may return.

pluggy ignores a misspelt hook, loses every result when one implementation raises, and does not check the results.
Here each of these faults is a `PluginError` that names the plugin and says what is expected.
"""

from __future__ import annotations

import importlib
import inspect
import types
from typing import TYPE_CHECKING, Any

import pluggy

from qsim_core import hookspecs
from qsim_core.errors import PluginError, QsimError, did_you_mean

if TYPE_CHECKING:
    from qsim_core.components.component import Component, Preset
    from qsim_core.components.discovery import Plugin

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("qsim_"))
"""The names of the hooks, in the order in which hookspecs declares them."""


def offers(plugin: Plugin, module: Any) -> dict[str, list[type[Component] | Preset]]:
    """Check a plugin against the hookspecs, call each of its hooks, and give the results by hook.

    Each plugin has its own pluggy manager. Raises `PluginError` for a plugin that breaks the contract.
    """
    manager = pluggy.PluginManager("qsim")
    manager.add_hookspecs(hookspecs)
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if hasattr(function, "qsim_impl") and name not in HOOKS:
            raise PluginError(f"{plugin} implements an unknown hook {name!r}{did_you_mean(name, HOOKS)}")
        if name in HOOKS and not hasattr(function, "qsim_impl"):
            raise PluginError(f"{plugin}: {name} lacks its mark; put @qsim_core.hookimpl above it")
    manager.register(module, plugin.name)
    manager.check_pending()
    implementations = [
        implementation for caller in manager.get_hookcallers(module) or [] for implementation in caller.get_hookimpls()
    ]
    if not implementations:
        raise PluginError(f"{plugin} implements no hook; there are {', '.join(HOOKS)}")
    found = {implementation.function.__name__: _checked(plugin, implementation) for implementation in implementations}
    names = [item.name for offered in found.values() for item in offered]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise PluginError(f"{plugin} offers {repeated[0]!r} twice; names are unique within a plugin")
    return found


def kind_of(hook: str) -> str:
    """The kind of component that a hook offers: `quantizer` for `qsim_quantizers`."""
    return hook.removeprefix("qsim_").removesuffix("s")


def base_of(hook: str) -> type[Component]:
    """The public base class of the components that a hook offers: `qsim_core.Quantizer` for `qsim_quantizers`."""
    public = importlib.import_module("qsim_core")  # the base classes are in packages that this one may not import
    base: type[Component] = getattr(public, kind_of(hook).title())
    return base


def hook_of(thing: Any) -> str:
    """The hook that offers a component class, or a preset, which counts as a quantizer.

    Raises `QsimError` for anything else.
    """
    from qsim_core.components.component import Preset

    if isinstance(thing, Preset):
        return "qsim_quantizers"
    hook = getattr(thing, "hook", "") if isinstance(thing, type) else ""
    if hook:
        return str(hook)
    kinds = ", ".join(kind_of(hook).title() for hook in HOOKS)
    raise QsimError(f"{thing!r} is neither a preset nor a subclass of {kinds}")


def has_hooks(thing: Any) -> bool:
    """Tell if an object, such as a module or an instance, implements hooks."""
    if isinstance(thing, type):
        return False
    return any(hasattr(function, "qsim_impl") for _, function in inspect.getmembers(thing, callable))


def inline(objects: tuple[Any, ...]) -> types.ModuleType:
    """Make a plugin module from components, each under the hook of its kind."""
    module = types.ModuleType("inline")
    for hook in {hook_of(thing) for thing in objects}:
        offered = [thing for thing in objects if hook_of(thing) == hook]
        setattr(module, hook, _hook(hook, offered))
    return module


def _hook(name: str, offered: list[Any]) -> Any:
    def implementation() -> list[Any]:
        return offered

    implementation.__name__ = name
    return hookspecs.hookimpl(implementation)


def _checked(plugin: Plugin, implementation: pluggy.HookImpl) -> list[type[Component] | Preset]:
    """Call one hook and check its result. Raises `PluginError` if it breaks the contract."""
    from qsim_core.components.component import Component, Preset, check_name, check_preset

    hook = implementation.function.__name__
    kind = kind_of(hook)
    if implementation.wrapper or implementation.hookwrapper:
        raise PluginError(f"{plugin}: {hook} cannot be a wrapper")
    offered = implementation.function()
    wanted = f"it returns a list of {kind} classes and presets"
    if not isinstance(offered, list):
        raise PluginError(f"{plugin}: {hook} returned {offered!r}; {wanted}")
    for item in offered:
        if not isinstance(item, Preset) and not (isinstance(item, type) and issubclass(item, Component)):
            raise PluginError(f"{plugin}: {hook} returned {item!r}; {wanted}")
        if not isinstance(item, Preset) and item.hook != hook:
            raise PluginError(
                f"{plugin}: {hook} returned {item.__name__}, which is not a subclass of {kind.title()}; {wanted}"
            )
        try:
            if isinstance(item, Preset):
                check_preset(item)
            check_name(getattr(item, "name", None))
        except QsimError as error:
            raise PluginError(f"{plugin}: {hook} returned {item!r}: {error}") from None
    return offered
