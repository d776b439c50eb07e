"""A process that works on a folder until nothing is left to claim: `python -m qsim_study.worker DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from qsim_core.cli.progress import hush_libraries
from qsim_core.components.host import Host
from qsim_study.folder import Folder
from qsim_study.work import Worker

if __name__ == "__main__":
    hush_libraries()
    for _ in Worker(Host()).work(Folder.open(Path(sys.argv[1]))):
        pass
