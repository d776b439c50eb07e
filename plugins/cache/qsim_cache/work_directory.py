"""The work directory of a run: finished blocks, statistics and baselines, which later runs find there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qsim_cache.blocks import Blocks
from qsim_cache.entry import CacheEntry
from qsim_cache.fingerprint import Unknowable
from qsim_core.files import make_work_dir
from qsim_core.simulation.static_calibration import Wanted

log = logging.getLogger(__name__)


class WorkDirectory:
    """A directory for what later runs can use: the `Store` of a run with a `work_dir`."""

    def __init__(self, path: Path) -> None:
        """Make the directory. Raises `QsimError` where that is impossible."""
        make_work_dir(path)
        self.path = path

    def blocks(self, model: nn.Module, batches: Sequence[Any], recipe: Any, *texts: str) -> Blocks | None:
        """The finished blocks of a transform; None, and a line in the log, where they cannot be told from others."""
        try:
            return Blocks.of(self.path, model, batches, recipe, *texts)
        except Unknowable as reason:
            log.warning("no blocks are kept for later runs: %s", reason)
            return None

    def statistics(
        self, model: nn.Module, value_axis: str, wanted: Wanted, batches: Sequence[Any]
    ) -> CacheEntry | None:
        """The place of the statistics for static scales; None where they cannot be told from others."""
        from qsim_cache.statistics import statistics_entry

        return statistics_entry(self.path, model, value_axis, wanted, batches)

    def baseline(self, evaluate: Callable[[], dict[str, float]], *made_from: Any) -> tuple[dict[str, float], bool]:
        """The baseline's metrics, and True if an earlier run had measured them."""
        from qsim_cache.baselines import baseline_entry, cached_baseline

        return cached_baseline(baseline_entry(self.path, *made_from), evaluate)
