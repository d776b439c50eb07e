"""A study from its specification to its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qsim_core import QsimError, Run
from qsim_core.components.host import Host, installed
from qsim_study.cell import Cell, Entry
from qsim_study.comparison import Comparison, comparisons
from qsim_study.executors import Executor, InProcess
from qsim_study.folder import Folder
from qsim_study.specification import Specification
from qsim_study.table import Row, columns, doubts, rows

FIRST_LOOK = 16
"""Samples of the first look with `until_decided`."""
LOOKS = 8
"""Looks at most; each doubles the samples."""


@dataclass
class Study:
    """The cells of a study, what was found in them, and how they compare."""

    cells: dict[str, Cell]
    entries: dict[str, Entry]
    comparisons: list[Comparison]
    """Every two cells of a model that saw the same samples; `first` and `second` are the rows' `key`."""
    notes: list[str] = field(default_factory=list)
    name: str = "study"

    @property
    def rows(self) -> list[Row]:
        """One dictionary for each cell, in the order of the specification."""
        return rows(self.cells, self.entries, self.comparisons)

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame. Raises `QsimError` without pandas."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise QsimError("to_dataframe needs pandas; pip install 'qsim-study[tables]'") from None
        return pandas.DataFrame(self.rows, columns=columns(self.rows))


def study(
    specification: Specification | Mapping[str, Any] | Path | str,
    output: Path | str,
    *,
    executor: Executor | None = None,
    host: Host | None = None,
    run: Run | None = None,
    many: bool = False,
    until_decided: bool = False,
    difference: float | None = None,
) -> Study:
    """Compute every cell of a study that `output` does not hold yet, and give what was found.

    `specification` is a mapping, or the path of a YAML file. A cell that fails is a row with its reason; it is tried
    again the next time. More than 10,000 combinations have to be allowed by `many`. With `until_decided` samples are
    doubled, for cells of which a comparison is open, until none is: until the interval of the ratio excludes 1, or lies
    closer to 1 than `difference`. Raises a `QsimError` for a specification that is wrong.
    """
    host, run, output = host or installed(), run or Run(), Path(output)
    if isinstance(specification, str | Path):
        specification = Specification.read(Path(specification))
    elif not isinstance(specification, Specification):
        specification = Specification.of(specification)
    executor = executor or InProcess()
    limits = [FIRST_LOOK << look for look in range(LOOKS)] if until_decided else [None]
    last: dict[int, tuple[str, Cell]] = {}
    entries: dict[str, Entry] = {}
    pairs: dict[tuple[int, int], Comparison] = {}
    with executor.started():
        with run.stage("planning"):
            cells = specification.cells(host, many)
        going = list(range(len(cells)))
        for limit in limits:
            folder = Folder.make(output, specification, [_limited(cells[place], limit) for place in going], host)
            last |= dict(zip(going, folder.cells.items(), strict=True))
            places = dict(zip(folder.cells, going, strict=True))
            _compute(folder, executor, host, run)
            entries |= (found := folder.entries())
            compared = comparisons(found, len(limits))
            pairs |= {(places[one.first], places[one.second]): one for one in compared}
            open_ = [one for one in compared if not one.settled(difference)]
            going = sorted({places[key] for one in open_ for key in (one.first, one.second)})
            if not going or _all_samples_seen(found, limit):
                break
    notes = doubts(entries.values())
    if until_decided and going:
        notes.append(f"undecided after {limit} samples: {len(going)} cells")
    whole = Folder(output, dict(last[place] for place in sorted(last)))
    whole.plan(specification.name)
    renamed = [replace(one, first=last[a][0], second=last[b][0]) for (a, b), one in pairs.items()]
    found = {key: entries[key] for key in whole.cells if key in entries}
    return Study(whole.cells, found, renamed, notes, specification.name)


def _compute(folder: Folder, executor: Executor, host: Host, run: Run) -> None:
    """Compute what is missing, with the count of cells and failures shown."""
    folder.retry()
    failed, total = 0, len(folder.cells)
    with run.count(total, total - len(folder.missing()), "cells") as step:
        for key in executor.run(folder, host, run):
            entry = folder.entry(key)
            failed += entry is None or entry.failure is not None
            step(f"cells ({failed} failed)" if failed else "cells")


def _limited(cell: Cell, limit: int | None) -> Cell:
    """The cell with so many samples; None leaves them as they are."""
    if limit is None:
        return cell
    return cell.model_copy(update={"circumstances": cell.circumstances.model_copy(update={"limit": limit})})


def _all_samples_seen(found: Mapping[str, Entry], limit: int | None) -> bool:
    """Tell if no cell has as many samples as it was allowed, so that more are not to be had."""
    seen = [entry.result.samples or 0 for entry in found.values() if entry.result is not None]
    return limit is None or all(samples < limit for samples in seen)
