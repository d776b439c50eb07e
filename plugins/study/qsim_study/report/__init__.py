"""The report of a study: a page for a browser, and pictures for slides."""

from __future__ import annotations

from qsim_study.report.page import write_report
from qsim_study.report.plots import check_plots, write_plots

__all__ = ["check_plots", "write_plots", "write_report"]
