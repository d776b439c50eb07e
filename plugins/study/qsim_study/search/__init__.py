"""Allot number formats by site under a budget.

    >>> from qsim_study.search import Budget, search
    >>> found = search("opt-tiny", weights=["int2", "int4", "int8"], budget=Budget(bits=4.5))     # doctest: +SKIP
    >>> print(found.recipe)                                                                      # doctest: +SKIP

Each name below is imported when it is first used, so that the command line stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {"search": "searching", "Budget": "found", "Found": "found"}

__all__ = ["Budget", "Found", "search"]

if TYPE_CHECKING:
    from qsim_study.search.found import Budget as Budget
    from qsim_study.search.found import Found as Found
    from qsim_study.search.searching import search as search


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qsim_study.search.{_HOME[name]}"), name)
