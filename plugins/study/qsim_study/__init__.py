"""Studies: many recipes on many models, compared with each other.

Each name below is imported when it is first used, so that the command line stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Dask": "executors",
    "InProcess": "executors",
    "Processes": "executors",
    "Slurm": "executors",
    "Specification": "specification",
    "Study": "running",
    "study": "running",
    "write_plots": "report",
    "write_report": "report",
}

__all__ = [*_HOME]  # noqa: PLE0604 - the names are all there

if TYPE_CHECKING:
    from qsim_study.executors import Dask as Dask
    from qsim_study.executors import InProcess as InProcess
    from qsim_study.executors import Processes as Processes
    from qsim_study.executors import Slurm as Slurm
    from qsim_study.report import write_plots as write_plots
    from qsim_study.report import write_report as write_report
    from qsim_study.running import Study as Study
    from qsim_study.running import study as study
    from qsim_study.specification import Specification as Specification


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qsim_study.{_HOME[name]}"), name)
