"""Everything that decides a number, value by value, for `sha256`.

Code counts by its text and not by its version: an evaluator that was edited is another one.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.components.discovery import functions
from qsim_core.simulation.environment import version_of
from qsim_core.snapshots import octets


class Unknowable(Exception):
    """Something that decides a number cannot be told from another of its kind."""


def sha256(leaves: Iterable[Any]) -> str:
    """The SHA-256 of values one after another: a tensor's dtype, shape and bytes, anything else's repr."""
    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            leaf = leaf if leaf.layout == torch.strided else leaf.to_dense()
            flat = leaf.detach().cpu().contiguous().as_strided((leaf.numel(),), (1,))  # one element may have any stride
            digest.update(octets(flat))
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def of_code(*classes: type) -> Iterator[Any]:
    """The source of the packages that define classes and the components they derive from, and of the core.

    Packages whose functions the core calls belong to it. Raises `Unknowable` for a class that was typed in.
    """
    entries = [plugin.entry for plugin in functions().values() if plugin.entry is not None]
    core = {"qsim_core", *(entry.module.partition(".")[0] for entry in entries)}
    deriving = [base for cls in classes for base in cls.__mro__ if base is cls or issubclass(base, Component)]
    for top in sorted(core.union(cls.__module__.partition(".")[0] for cls in deriving)):
        found = find_spec(top) if top in core else getattr(sys.modules.get(top), "__spec__", None)
        folders = getattr(found, "submodule_search_locations", None) or ()
        files = [path for folder in folders for path in Path(folder).rglob("*.py")]
        for source in sorted(files) if folders else [file_of(top)]:
            yield from (top, source.name, source.read_bytes())


def of_requirements(distributions: Iterable[str]) -> Iterator[Any]:
    """The versions of distributions and of their dependencies."""
    for distribution in sorted(distributions):
        try:
            lines = requires(distribution) or []
        except PackageNotFoundError:
            continue
        names = {match[0] for line in lines if (match := re.match(r"[\w.-]+", line))}
        yield from ((name, version_of(name)) for name in sorted({distribution, *names}))


def file_of(module: str) -> Path:
    """The file of a module's source. Raises `Unknowable` without one."""
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    if not file.is_file():
        raise Unknowable(f"the code of {module} is not in a file")
    return file
