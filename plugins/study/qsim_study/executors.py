"""Ways to compute the cells of a folder: in this process, in several, on a Dask cluster, under Slurm.

All of them run the same `Worker` on the same folder, so none has results of its own, and any of them may die.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import torch

from qsim_core import QsimError, Run
from qsim_core.components.host import Host, installed
from qsim_core.errors import one_line
from qsim_study.cell import Entry
from qsim_study.folder import DEATHS, Folder
from qsim_study.work import Worker, check_plugins

PAUSE = 0.1
"""Seconds between two looks at a folder."""
LAST_WORDS = 2000
"""Bytes of a dead process's errors that are looked at."""


class Executor(ABC):
    """Computes the cells of a folder."""

    def started(self) -> AbstractContextManager[Any]:
        """Surrounds planning and `run`: what takes time to start may start here."""
        return nullcontext()

    @abstractmethod
    def run(self, folder: Folder, host: Host, run: Run) -> Iterator[str]:
        """Compute every cell that is missing, and give the key of each that is done. Raises `QsimError`."""


class InProcess(Executor):
    """One cell after another in this process."""

    def run(self, folder: Folder, host: Host, run: Run) -> Iterator[str]:
        """Compute the cells; those that another process has claimed are waited for, and computed here if it dies."""
        worker, missing = Worker(host, run), set(folder.missing())
        for key in worker.work(folder):
            missing.discard(key)
            yield key
        yield from _watch(folder, missing, lambda: deque(worker.work(folder, missing), maxlen=0))


class Processes(Executor):
    """Several processes of this machine, which share its cores. One that dies is started again.

    On Linux they are forks of one process, which starts while cells are planned. Cells of a GPU are not for forks.
    """

    def __init__(self, many: int) -> None:
        self.many = many
        self._started: list[subprocess.Popen[bytes]] = []
        self._errors: IO[bytes] | None = None

    @contextmanager
    def started(self) -> Iterator[None]:
        """Inside, one process is there or starts; all end with the block."""
        with tempfile.TemporaryFile() as self._errors:
            self._start()
            try:
                yield
            finally:
                for process in self._started:
                    process.terminate()
                while self._started:
                    self._started.pop().communicate()

    def run(self, folder: Folder, host: Host, run: Run) -> Iterator[str]:
        """Have the processes work, and look at the folder until no cell is missing."""
        many = min(self.many, len(folder.missing()))
        if not many:
            return
        forks = sys.platform == "linux" and all(cell.circumstances.device == "cpu" for cell in folder.cells.values())
        threads = max(1, torch.get_num_threads() // many)
        task = {"folder": str(folder.path), "forks": many if forks else 0, "threads": threads}
        budget = [None] * (DEATHS * len(folder.cells) + many)  # a process may die before it claims a cell

        def revive() -> None:
            for process in [one for one in self._started if one.poll() is not None]:
                self._started.remove(process)
                process.communicate()
                budget.pop()
                if process.returncode > 0 or not budget:  # not killed: it will fail again
                    raise QsimError(f"a worker ended with {process.returncode}: {self._last_words()}")
                self._give(task, self._start())

        while len(self._started) < (1 if forks else many):
            self._start()
        for process in self._started:
            self._give(task, process)
        yield from _watch(folder, set(folder.missing()), revive)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.many))}
        command = [sys.executable, "-m", "qsim_study.worker"]
        process = subprocess.Popen(command, env=environment, stderr=self._errors, stdin=subprocess.PIPE)
        self._started.append(process)
        return process

    @staticmethod
    def _give(task: dict[str, Any], process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it died, and is started again
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()

    def _last_words(self) -> str:
        """The last line of what processes wrote as errors."""
        assert self._errors is not None
        self._errors.seek(max(0, self._errors.tell() - LAST_WORDS))
        return (self._errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]


class Dask(Executor):
    """A Dask cluster: of this machine, or behind the address of a scheduler."""

    def __init__(self, address: str | None = None, many: int | None = None, timeout: float = 10) -> None:
        self.address, self.many, self.timeout = address, many, timeout

    def run(self, folder: Folder, host: Host, run: Run) -> Iterator[str]:
        """Submit each cell as a task; Dask gives the tasks of a worker that died to others."""
        distributed = _import("distributed", "dask")
        client = self._client(distributed)
        try:
            needs = {name: found for cell in folder.cells.values() for name, found in cell.needs.items()}
            for address, lack in client.run(_lack, needs).items():
                if lack:
                    raise QsimError(f"the worker {address}: {lack}")
            submitted = {
                client.submit(_compute, str(folder.path), key, pure=False, retries=1): key for key in folder.missing()
            }
            for future in distributed.as_completed(submitted):
                key = submitted[future]
                if future.cancelled():
                    left = f"{len(folder.missing())} of {len(folder.cells)} cells are missing"
                    raise QsimError(f"the Dask scheduler is gone; {left}, and the next run goes on with them")
                if not folder.is_done(key):
                    reason = one_line(future.exception() or RuntimeError("it ended without a result"))
                    folder.write(key, Entry(cell=folder.cells[key], failure=reason))
                yield key
        finally:
            client.close()
            if self.address is None:
                client.cluster.close()

    def _client(self, distributed: Any) -> Any:
        if self.address is None:
            many = self.many or os.cpu_count() or 1
            cluster = distributed.LocalCluster(
                n_workers=many, threads_per_worker=1, dashboard_address=None, processes=True
            )
            return distributed.Client(cluster)
        try:
            return distributed.Client(self.address, timeout=self.timeout)
        except (OSError, ValueError) as error:
            raise QsimError(f"no Dask scheduler answers at {self.address}: {one_line(error)}") from None


class Slurm(Executor):
    """Jobs of Slurm by submitit, each of which works until no cell is left. The folder has to be shared."""

    def __init__(self, many: int, cluster: str | None = None, options: dict[str, Any] | None = None) -> None:
        self.many, self.cluster, self.options = many, cluster, options or {}

    def run(self, folder: Folder, host: Host, run: Run) -> Iterator[str]:
        """Submit the jobs, and look at the folder until no cell is missing or all jobs have ended."""
        submitit = _import("submitit", "slurm")
        try:
            executor = submitit.AutoExecutor(folder=folder.path / "slurm", cluster=self.cluster)
            executor.update_parameters(**({"timeout_min": 24 * 60} | self.options))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise QsimError(f"Slurm cannot be used: {one_line(error)}") from None
        jobs = executor.map_array(_work, [str(folder.path)] * min(self.many, len(folder.missing())))

        def check() -> None:
            if all(job.done() for job in jobs) and folder.missing():
                errors = [one_line(error) for job in jobs if (error := job.exception()) is not None]
                raise QsimError(
                    f"every job has ended, and {len(folder.missing())} cells are missing; run it again"
                    + (f" ({errors[0]})" if errors else "")
                )

        try:
            yield from _watch(folder, set(folder.missing()), check)
        except BaseException:
            for job in jobs:
                job.cancel(check=False)
            raise
        for job in jobs:
            job.wait()


def _watch(folder: Folder, missing: set[str], between: Any) -> Iterator[str]:
    """Give the keys of missing cells as they get done; `between` is called again and again."""
    while missing:
        done = {key for key in missing if folder.is_done(key)}
        missing -= done
        yield from done
        if missing and not done:
            between()
            time.sleep(PAUSE)


def _work(path: str) -> None:
    """Work in a folder until nothing is left to claim."""
    for _ in Worker(installed()).work(Folder.open(Path(path))):
        pass


_kept: list[Worker] = []
"""The worker of this process, with the model of its last cell."""


def _compute(path: str, key: str) -> None:
    """Compute one cell in a process that computes others too."""
    if not _kept:
        _kept.append(Worker(installed()))
    for _ in _kept[0].work(Folder.open(Path(path)), [key]):
        pass


def _lack(needs: dict[str, str]) -> str:
    """Say what is not installed here; empty if all is."""
    try:
        check_plugins(needs)
    except QsimError as error:
        return str(error)
    return ""


def _import(library: str, extra: str) -> Any:
    """Import a library of an extra. Raises `QsimError` if it is not installed."""
    import importlib

    try:
        return importlib.import_module(library)
    except ModuleNotFoundError:
        raise QsimError(f"{library} is not installed; pip install 'qsim-study[{extra}]'") from None
