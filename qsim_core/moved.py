"""Modules of qsim 0.1 that have moved, so that a plugin written for 0.1 still loads.

A module that has moved within the core is imported under its old name as an alias, with a `DeprecationWarning`. For a
module that has left the core an `ImportError` names the new module and its distribution.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CORE = "qsim_core"
RENAMED = {"Fixed": ("StaticScheme",), "Form": ("Lowering",), "Watcher": ("MatmulWatcher", "OperatorWatcher")}
"""Old name -> the names that it has now, each in another module."""


@functools.cache
def moved() -> dict[str, list[str]]:
    """Old module of the core -> the modules that have its names now, as `moved.txt` lists them."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    return {old: places for old, *places in map(str.split, lines)}


class MovedModules:
    """Finds the old modules; it stands last on `sys.meta_path`, so only a name that is not found gets here."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        """The alias of a module of 0.1; None for any other name. Raises `ImportError` if it has left the core."""
        package, _, old = name.partition(".")
        if package != CORE or old not in moved():
            return None
        left = [place for place in moved()[old] if place.partition(".")[0] != CORE]
        if left:
            distribution = left[0].partition(".")[0].replace("_", "-")
            raise ImportError(f"{name} has moved to {_listed(left)} (pip install {distribution})", name=name)
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, cls)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: Any) -> None:
        """Leave it to Python to make the module."""

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        """Make a module an alias that looks names up in the new modules."""
        warnings.warn(_sentence(module.__name__), DeprecationWarning, stacklevel=2)
        vars(module)["__getattr__"] = lambda name: _look_up(module.__name__, name)


def names_of_0_1(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that was a module in 0.1: it finds the names of that module."""

    def find(name: str) -> Any:
        from importlib.util import find_spec

        if name.startswith("__") or find_spec(f"{package}.{name}") is not None:  # a submodule is imported by itself
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = _look_up(package, name)
        warnings.warn(_sentence(package), DeprecationWarning, stacklevel=2)
        setattr(sys.modules[package], name, found)
        return found

    return find


def install() -> None:
    """Let old modules be found, once."""
    if MovedModules not in sys.meta_path:
        sys.meta_path.append(MovedModules)


def _look_up(module: str, name: str) -> Any:
    """The object of this name in the new modules of an old one. Raises `AttributeError`."""
    if not name.startswith("__"):
        for place in moved()[module.partition(".")[2]]:
            found = importlib.import_module(place)
            for known_as in (name, *RENAMED.get(name, ())):
                if hasattr(found, known_as):
                    return getattr(found, known_as)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _sentence(module: str) -> str:
    return f"{module} has moved to {_listed(moved()[module.partition('.')[2]])}"


def _listed(places: Sequence[str]) -> str:
    *others, last = places
    return f"{', '.join(others)} and {last}" if others else last
