"""The cost of each site of a recipe: predicted by one gradient pass, and verified by runs of single sites.

Each name below is imported when it is first used, so that the command line stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {"Blame": "report", "Cost": "report", "SiteBlame": "report", "blame": "whole"}

__all__ = ["Blame", "Cost", "SiteBlame", "blame"]

if TYPE_CHECKING:
    from qsim_study.blame.report import Blame as Blame
    from qsim_study.blame.report import Cost as Cost
    from qsim_study.blame.report import SiteBlame as SiteBlame
    from qsim_study.blame.whole import blame as blame


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qsim_study.blame.{_HOME[name]}"), name)
