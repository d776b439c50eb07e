"""The default host, which builds components from text if no host is given: that of the installed plugins."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

_makers: list[Callable[[], Any]] = []
"""The function that gives the default host, alone in this list."""


def set_default_host(make: Callable[[], Any]) -> None:
    """Set the function that gives the default host; `qsim_core.components.host` does so when it is imported."""
    _makers[:] = [make]


def default_host() -> Any:
    """The host of the installed plugins."""
    if not _makers:
        importlib.import_module("qsim_core.components.host")
    return _makers[0]()
