"""Dask computes cells on other machines; here with real workers, some of which are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from qsim_study import Dask, study
from qsim_study.folder import Folder
from qsim_study.work import check_plugins

import qsim_core as qsim

distributed = pytest.importorskip("distributed")
TEXT = str(Path(__file__).parents[3] / "README.md")
EVALUATE = "perplexity(seqlen=16)"
SMALL: dict[str, Any] = {
    "models": ["opt-tiny"],
    "recipe": {"evaluate": EVALUATE},
    "vary": {"weights": ["int4", "int6", "int8"]},
    "data": TEXT,
    "limit": 2,
}


@pytest.fixture(scope="module")
def cluster() -> Any:
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as found:
        yield found


def alone(weights: str) -> float:
    """The perplexity of a cell, by an evaluation in this process."""
    recipe = {"model": "opt-tiny", "weights": weights, "evaluate": EVALUATE}
    return qsim.evaluate(recipe, data=TEXT, run=qsim.Run(limit=2)).simulated["perplexity"]


def test_a_worker_gives_the_numbers_of_this_process(cluster: Any, tmp_path: Path) -> None:
    found = study(SMALL, tmp_path, executor=Dask(cluster.scheduler_address))

    assert [row["simulated"] for row in found.rows] == [alone(weights) for weights in SMALL["vary"]["weights"]]
    assert str(os.getpid()) not in {entry.worker.rpartition(":")[2] for entry in found.entries.values()}


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    killed: list[int] = []

    @contextmanager
    def count(total: int, done: int, description: str) -> Any:
        def step(text: str) -> None:
            if not killed:
                entry = next(iter(Folder.open(tmp_path).entries().values()))
                killed.append(int(entry.worker.rpartition(":")[2]))
                os.kill(killed[0], signal.SIGKILL)

        yield step

    found = study(SMALL, tmp_path, executor=Dask(cluster.scheduler_address), run=qsim.Run(count=count))

    assert killed
    assert [row.get("failure") for row in found.rows] == [None] * 3
    assert found.rows[0]["simulated"] == alone("int4")


def test_a_scheduler_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(qsim.QsimError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        study(SMALL, tmp_path, executor=Dask("tcp://127.0.0.1:9", timeout=1))


@contextmanager
def separate_cluster() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler and a worker in processes of their own: the address and the scheduler."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    ways = {
        "dask_scheduler": ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
        "dask_worker": [address, "--nthreads", "1", "--no-nanny", "--no-dashboard"],
    }
    started = [
        subprocess.Popen([sys.executable, "-m", f"distributed.cli.{way}", *options]) for way, options in ways.items()
    ]
    try:
        yield address, started[0]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_scheduler_that_dies_in_the_middle_is_an_error_and_the_next_run_goes_on(tmp_path: Path) -> None:
    with separate_cluster() as (address, scheduler):

        @contextmanager
        def count(total: int, done: int, description: str) -> Any:
            yield lambda text: scheduler.kill()

        with pytest.raises(qsim.QsimError, match=r"the Dask scheduler is gone; \d of 3 cells are missing") as caught:
            study(SMALL, tmp_path, executor=Dask(address, timeout=60), run=qsim.Run(count=count))

    assert "\n" not in str(caught.value)
    assert [row.get("failure") for row in study(SMALL, tmp_path).rows] == [None] * 3


def test_a_plugin_that_is_not_installed_at_all_is_named_with_its_version() -> None:
    with pytest.raises(qsim.QsimError, match=r"lacks qsim-nowhere 0\.3: it is not installed$"):
        check_plugins({"qsim-nowhere": "0.3"})


def test_a_worker_without_a_plugin_is_named(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsim_study.cell.Cell.planned", _planned_with_another_version)

    with pytest.raises(qsim.QsimError, match=r"the worker tcp://.*lacks qsim-int 9\.9: 0\.1\.0 is installed"):
        study(SMALL, tmp_path, executor=Dask(cluster.scheduler_address))


def _planned_with_another_version(self: Any, host: Any) -> Any:
    return self.label, self.model_copy(update={"needs": {"qsim-int": "9.9"}})
