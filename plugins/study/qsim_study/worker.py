"""A process that has others work on folders: `python -m qsim_study.worker`, with a line of JSON for each folder.

It imports what workers need, and loads the first model, once for all of them: workers are forks of it, and it computes
nothing itself. Where a fork is not safe, it works on the folder alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from qsim_core.cli.progress import hush_libraries
from qsim_core.components.host import installed
from qsim_study.folder import DEATHS, Folder
from qsim_study.work import Worker

PAUSE = 0.5
"""Seconds between two looks at cells that others have claimed."""


def supervise(worker: Worker, folder: Folder, many: int, threads: int) -> None:
    """Work on a folder by so many forks until nothing is left to claim. One that was killed is forked again."""
    workers: set[int] = set()

    def stop(number: int, frame: Any) -> None:
        for process in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        os._exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    left = DEATHS * len(folder.cells) + many  # a process may die before it claims a cell
    while many or workers:
        if many:
            workers.add(_fork(worker, folder, threads))
            many -= 1
            continue
        process, status = os.wait()
        workers.discard(process)
        code = os.waitstatus_to_exitcode(status)
        if code < 0 and left and folder.missing():
            many, left = 1, left - 1
        elif code:
            stop(abs(code), None)
        elif not workers and folder.missing():  # others have claimed what is missing, and may die
            time.sleep(PAUSE)
            many = 1
    signal.signal(signal.SIGTERM, before)


def _fork(worker: Worker, folder: Folder, threads: int) -> int:
    """Give the id of a new process that works on the folder."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(threads)
        for _ in worker.work(folder):
            pass
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # what is shared with the other processes is not taken apart


def main() -> None:
    """Work on each folder that a line of the input names."""
    torch.set_num_threads(1)  # threads of this process would not be in a fork
    hush_libraries()
    worker = Worker(installed())
    for line in sys.stdin:
        task = json.loads(line)
        folder = Folder.open(Path(task["folder"]))
        if task["forks"]:
            worker.prepare(folder)
            supervise(worker, folder, task["forks"], task["threads"])
        else:
            torch.set_num_threads(task["threads"])
            while folder.missing():
                for _ in worker.work(folder):
                    pass
                time.sleep(PAUSE)


if __name__ == "__main__":
    main()
