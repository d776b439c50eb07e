"""Studies: many recipes on many models, compared with each other."""

from __future__ import annotations

from qsim_study.executors import Dask, InProcess, Processes, Slurm
from qsim_study.report import write_plots, write_report
from qsim_study.specification import Specification
from qsim_study.study import Study, study

__all__ = [
    "Dask",
    "InProcess",
    "Processes",
    "Slurm",
    "Specification",
    "Study",
    "study",
    "write_plots",
    "write_report",
]
