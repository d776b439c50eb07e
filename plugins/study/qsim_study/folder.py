"""The folder of a study: one file for each cell, which appears whole or not at all.

The folder is the engine. A process claims a cell, computes it and writes its file. A process that dies gives
its claim back, and the cell is computed by another. Any number of processes may work on one folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from qsim_core import QsimError
from qsim_core.components.host import Host
from qsim_core.files import make_work_dir, read_checked, write_checked, writing
from qsim_study.cell import Cell, Entry
from qsim_study.specification import Specification

STUDY = "study.json"
DEATHS = 2
"""A cell that so many processes died of has failed."""


class Folder:
    """A study's folder and the keys of its cells."""

    def __init__(self, path: Path, cells: dict[str, Cell]) -> None:
        self.path, self.cells = path, cells

    @classmethod
    def make(cls, path: Path, specification: Specification, cells: Sequence[Cell], host: Host) -> Folder:
        """Make the folder, or go on with it. Raises `QsimError` if it holds another study, or other files."""
        keyed = dict(cell.planned(host) for cell in cells)
        make_work_dir(path)
        path = path.resolve()  # workers may stand elsewhere
        if (path / STUDY).exists():
            before = _read_plan(path)
            if before["name"] != specification.name and not before["cells"].keys() & keyed.keys():
                raise QsimError(
                    f"{path} holds another study, {before['name']!r}, of {len(before['cells'])} cells; name another "
                    f"directory with --output"
                )
        elif any(path.iterdir()):
            raise QsimError(f"{path} is not empty and holds no study; name another directory with --output")
        for part in ("cells", "claims", "batches"):
            (path / part).mkdir(exist_ok=True)
        folder = cls(path, keyed)
        folder.plan(specification.name)
        return folder

    def plan(self, name: str) -> None:
        """Write the study's name and its cells, for those who open the folder."""
        cells = {key: cell.model_dump(mode="json") for key, cell in self.cells.items()}
        with writing(self.path / STUDY) as file:
            file.write(json.dumps({"name": name, "cells": cells}, indent=1).encode())

    @classmethod
    def open(cls, path: Path) -> Folder:
        """The folder of a study that was planned. Raises `QsimError`."""
        return cls(path, {key: Cell.model_validate(cell) for key, cell in _read_plan(path)["cells"].items()})

    def entry(self, key: str) -> Entry | None:
        """The entry of a cell; None as long as there is none."""
        content = read_checked(self._file(key))
        try:
            return None if content is None else Entry.model_validate_json(content)
        except ValidationError:  # another version wrote it
            return None

    def entries(self) -> dict[str, Entry]:
        """The entries that there are so far, in the order of the cells."""
        found = {key: self.entry(key) for key in self.cells}
        return {key: entry for key, entry in found.items() if entry is not None}

    def write(self, key: str, entry: Entry) -> None:
        """Write what was found in a cell. Raises `QsimError` if that is impossible."""
        write_checked(self._file(key), entry.model_dump_json().encode())

    def batches(self, cell: Cell) -> dict[int, Tensor]:
        """The numbers of batches that the cell has given with fewer samples, by place."""
        content = read_checked(self._batches(cell))
        found = {} if content is None else json.loads(content)
        return {int(place): torch.tensor(numbers, dtype=torch.float64) for place, numbers in found.items()}

    def write_batches(self, cell: Cell, found: Mapping[int, Tensor]) -> None:
        """Write the numbers of batches for a later look at more samples. Raises `QsimError` if that is impossible."""
        numbers = {place: rows.tolist() for place, rows in found.items()}
        write_checked(self._batches(cell), json.dumps(numbers).encode())

    def is_done(self, key: str) -> bool:
        """Tell if a cell has its file. `entry` looks into it."""
        return self._file(key).exists()

    def missing(self) -> list[str]:
        """The keys of cells that have no file."""
        return [key for key in self.cells if not self.is_done(key)]

    def retry(self) -> None:
        """Forget what failed or is damaged, so that it is computed again."""
        for key in self.cells:
            entry = self.entry(key)
            if entry is None or entry.failure is not None:
                self._file(key).unlink(missing_ok=True)
                self._claim(key).write_bytes(b"")

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Give True if no other process works at a cell; it is claimed until the block ends or this process dies.

        A claim counts the processes that died under it. Of too many the cell has failed, and its entry says so.
        """
        import fcntl

        with self._claim(key).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            file.seek(0)
            died = len(file.read())
            if self.is_done(key):
                yield False
            elif died >= DEATHS:
                reason = f"the process that computed it died, {died} times; it was killed, or memory ran out"
                self.write(key, Entry(cell=self.cells[key], failure=reason))
                yield False
            else:
                file.write("x")
                file.flush()
                try:
                    yield True
                finally:
                    file.truncate(0)

    def _file(self, key: str) -> Path:
        return self.path / "cells" / f"{key}.jsonl"

    def _batches(self, cell: Cell) -> Path:
        return self.path / "batches" / cell.batches

    def _claim(self, key: str) -> Path:
        return self.path / "claims" / key


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads((path / STUDY).read_bytes())
        return {"name": plan["name"], "cells": dict(plan["cells"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise QsimError(f"{path / STUDY} is not a study's; name another directory with --output") from None
