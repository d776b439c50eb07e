"""What qsim keeps, in a work directory and in the user's cache: what there is, how large and how old, and its removal.

All of it can be made again. Nothing but files that qsim has written is counted or removed, whatever else lies beside
them, and a run that is at work meanwhile only computes again what it no longer finds.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from qsim_core.errors import QsimError, did_you_mean, file_did_you_mean
from qsim_core.files import cache
from qsim_core.simulation.store import ENDING, KINDS, about

IN_A_WORK_DIRECTORY = (*KINDS, "blocks")
FOR_THE_USER = ("kernels", "zoo")
STAMP = "[0-9a-f]" * 16
"""The digest in a name, as a shell's pattern."""
PARTIAL = "tmp"
"""How the name of a file begins that is being written."""
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


@dataclass(frozen=True)
class Entry:
    """One thing that is kept: a file, or a directory of files."""

    kind: str
    model: str
    what: str
    path: Path

    @property
    def files(self) -> list[Path]:
        """The files that it consists of, none that is being written."""
        found = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return [path for path in found if path.is_file() and not path.name.startswith(PARTIAL)]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def seconds(self) -> float:
        """Its age."""
        return max(0.0, time.time() - max((path.stat().st_mtime for path in self.files), default=time.time()))

    def remove(self) -> None:
        """Take it away. Raises `QsimError`."""
        try:
            for path in self.files:
                path.unlink(missing_ok=True)
            folders = [path for path in self.path.rglob("*") if path.is_dir()] if self.path.is_dir() else []
            for folder in [*sorted(folders, reverse=True), self.path if self.path.is_dir() else self.path.parent]:
                with contextlib.suppress(OSError):  # something else is in it
                    folder.rmdir()
        except OSError as error:
            raise QsimError(f"cannot remove {self.path}: {error.strerror or error}") from None


def entries(work_dir: Path | None) -> list[Entry]:
    """Everything that is kept in a work directory, if one is named, and for the user. Raises `QsimError`."""
    if work_dir is not None and not work_dir.is_dir():
        raise QsimError(f"there is no directory {work_dir}{file_did_you_mean(work_dir)}")
    return [*(_in(work_dir) if work_dir is not None else ()), *_for_the_user()]


def _in(work_dir: Path) -> Iterator[Entry]:
    for kind in KINDS:
        for path in sorted((work_dir / kind).glob(f"*{ENDING}")):
            said = about(path)
            yield Entry(kind, str(said.get("model", "")), str(said.get("what", "damaged")), path)
    for folder in sorted(work_dir.glob(STAMP)):
        if blocks := len(list(folder.glob("block-*.pt"))):
            yield Entry("blocks", "", f"{blocks} finished by a transform", folder)


def _for_the_user() -> Iterator[Entry]:
    for path in sorted((cache() / "kernels").glob(f"{STAMP}.so")):
        yield Entry("kernels", "", "compiled kernels", path)
    for path in sorted((cache() / "zoo").glob(f"{STAMP}/*/")):
        if not path.name.startswith(PARTIAL):
            yield Entry("zoo", path.name, "made of another model", path)


def show(work_dir: Path | None, as_json: bool) -> None:
    """Print what there is."""
    found = entries(work_dir)
    if as_json:
        click.echo(_json(found))
        return
    from rich.filesize import decimal
    from rich.table import Table

    from qsim_core.cli.console import console

    table = Table("kind", "model", "what", "size", "age", box=None, pad_edge=False)
    for entry in found:
        table.add_row(entry.kind, entry.model, entry.what, decimal(entry.bytes), _age(entry.seconds))
    out = console()
    if found:
        out.print(table)
    where = f"{cache()}" if work_dir is None else f"{work_dir} and {cache()}"
    out.print(f"{_many(found)} in {where}", style="dim", soft_wrap=True)
    if work_dir is None:
        out.print("what `qsim evaluate --work-dir DIR` keeps is shown with --work-dir DIR", style="dim", soft_wrap=True)


def clear(work_dir: Path | None, kind: str, yes: bool, as_json: bool) -> None:
    """Remove what is kept, of one kind or "all", once it is confirmed. Raises `QsimError`."""
    known = ["all", *IN_A_WORK_DIRECTORY, *FOR_THE_USER]
    if kind not in known:
        raise QsimError(f"nothing of kind {kind!r} is kept{did_you_mean(kind, known)}")
    if kind in IN_A_WORK_DIRECTORY and work_dir is None:
        raise QsimError(f"--clear {kind} needs the work directory; name it with --work-dir")
    found = [entry for entry in entries(work_dir) if kind in ("all", entry.kind)]
    said, many = _json(found), _many(found)
    if found and not yes:
        if not sys.stdin.isatty():
            raise QsimError(f"{many} would be removed, and there is no terminal to ask on; say --yes")
        if not click.confirm(f"Remove {many}?", err=True):
            raise QsimError("nothing was removed")
    for entry in found:
        entry.remove()
    click.echo(said if as_json else f"removed {many}")


def _json(found: Iterable[Entry]) -> str:
    rows = [{**asdict(entry), "path": str(entry.path)} for entry in found]
    numbers = [{"bytes": entry.bytes, "seconds": round(entry.seconds)} for entry in found]
    return json.dumps([row | more for row, more in zip(rows, numbers, strict=True)], indent=2)


def _many(found: list[Entry]) -> str:
    from rich.filesize import decimal

    entry = "entry" if len(found) == 1 else "entries"
    return f"{len(found)} {entry} ({decimal(sum(e.bytes for e in found))})"


def _age(seconds: float) -> str:
    unit, length = next(((u, n) for u, n in UNITS if seconds >= n), UNITS[-1])
    return f"{int(seconds // length)} {unit}"
