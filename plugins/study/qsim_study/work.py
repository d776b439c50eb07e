"""Compute cells of a folder, in one process: each model is loaded once, and each recipe undone exactly."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from qsim_core import Bench, Evaluator, QsimError, Recipe, Run
from qsim_core.cli.recipe_options import hardware_of
from qsim_core.components.host import Host
from qsim_core.errors import one_line
from qsim_core.evaluation.job import Job
from qsim_core.simulation.environment import version_of
from qsim_study.blame.whole import predicted
from qsim_study.cell import Cell, Circumstances, Entry, Scores, SiteCosts
from qsim_study.folder import Folder
from qsim_study.histograms import Histograms

Place = tuple[str | None, str, str]
"""A model, a device and a dtype."""


class Worker:
    """Computes cells, and keeps the model of the last one."""

    def __init__(self, host: Host, run: Run | None = None) -> None:
        self.host, self.run = host, run or Run()
        self._bench: tuple[Place, Bench] | None = None

    def prepare(self, folder: Folder) -> None:
        """Load the model of the first cell that is missing. If that fails, the cell will say so."""
        with contextlib.suppress(Exception):
            cell = folder.cells[folder.missing()[0]]
            self._on_bench((cell.model, cell.circumstances.device, cell.circumstances.dtype)).load()

    def work(self, folder: Folder, keys: Iterable[str] | None = None) -> Iterator[str]:
        """Compute the cells that no other process has claimed, and give the key of each when it is done."""
        for key in list(folder.cells) if keys is None else keys:
            if folder.is_done(key):
                continue
            with folder.claim(key) as mine:
                if mine:
                    folder.write(key, self.compute(folder.cells[key], folder))
                    yield key

    def compute(self, cell: Cell, folder: Folder) -> Entry:
        """Measure a cell. An error of any kind is the cell's, with its reason in one line."""
        start = time.perf_counter()
        here = f"{platform.node()}:{os.getpid()}"
        try:
            check_plugins(cell.needs)
            found = self._measured(cell, folder)
        except QsimError as error:
            found = Entry(cell=cell, failure=str(error))
        except Exception as error:  # of torch, of a model's code, of a plugin: others must run
            found = Entry(cell=cell, failure=f"{type(error).__name__}: {one_line(error)}")
        return found.model_copy(update={"seconds": time.perf_counter() - start, "worker": here})

    def _measured(self, cell: Cell, folder: Folder) -> Entry:
        around, recipe = cell.circumstances, cell.recipe_of(self.host)
        bench = self._on_bench((cell.model, around.device, around.dtype))
        run = replace(around.run(self.run), work_dir=folder.path / "shared")
        on = hardware_of(around.on, self.host)
        counted, known = Histograms(around.histograms), folder.batches(cell)
        try:
            measured = bench.measure(
                recipe,
                around.data,
                calibration=around.calibration(),
                run=run,
                on=on,
                observer=counted if around.histograms else None,
                known=known,
            )
            folder.write_batches(cell, known)
            blamed = self._blamed(bench, recipe, around, run) if around.blame else None
        finally:
            if not bench.intact:
                self._bench = None
        evaluator = self.host.parse(measured.result.evaluator, Evaluator)
        return Entry(
            cell=cell,
            result=measured.result,
            scores=Scores.of(measured.simulated),
            higher_is_better=evaluator.higher_is_better,
            histograms=list(counted.found.values()),
            blame=blamed,
        )

    def _blamed(self, bench: Bench, recipe: Recipe, around: Circumstances, run: Run) -> SiteCosts:
        """The predicted cost of each site; the reason, if the recipe or the model allows no prediction."""
        job = Job.at(bench.located, recipe, self.host)
        try:
            found = predicted(bench, job, job.data(around.data), around.calibration(), around.blame, run)
        except QsimError as error:
            return SiteCosts(reason=str(error))
        return SiteCosts(costs={row.site: row.parts for row in found.rows})

    def _on_bench(self, place: Place) -> Bench:
        if self._bench is None or self._bench[0] != place:
            self._bench = None  # its memory first
            model, device, dtype = place
            self._bench = place, Bench(model, host=self.host, device=device, dtype=dtype)
        return self._bench[1]


def check_plugins(needs: Mapping[str, str]) -> None:
    """Raise `QsimError` if a distribution that is needed is not installed here, or in another version."""
    for distribution, planned in needs.items():
        here = version_of(distribution)
        if here != planned:
            found = "it is not installed" if here is None else f"{here} is installed"
            raise QsimError(f"{platform.node()} lacks {distribution} {planned}: {found}")
