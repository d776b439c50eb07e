"""The cost of each site of a recipe: predicted by one gradient pass, and verified by runs of single sites."""

from __future__ import annotations

from qsim_study.blame.report import Blame, Cost, SiteBlame
from qsim_study.blame.whole import blame

__all__ = ["Blame", "Cost", "SiteBlame", "blame"]
