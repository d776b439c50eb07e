"""`qsim cache`: what qsim keeps in a work directory and in the user's cache, how large and how old, and its removal.

All of it can be made again. Only files that qsim has written are counted or removed. A run that goes on meanwhile
computes again what it no longer finds.
"""

from __future__ import annotations

import contextlib
import glob
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from qsim_cache.sealing import SEAL, sealed
from qsim_core.errors import QsimError, did_you_mean, file_did_you_mean
from qsim_core.files import CACHE_NOTE, LOCK, described
from qsim_core.files import cache as user_cache

STAMP = "[0-9a-f]" * 16
"""The digest in a name, as a shell's pattern."""
BLOCK = "block-[0-9]*.pt"
"""The name of a transform's finished block."""
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


@click.command()
@click.option("--work-dir", type=click.Path(path_type=Path), metavar="DIR", help="What runs have kept there, too.")
@click.option(
    "--clear", is_flag=False, flag_value="all", metavar="[KIND]", help="Remove everything shown, or one kind of it."
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cache(work_dir: Path | None, clear: str | None, yes: bool, as_json: bool) -> None:
    """Show what is kept to be used again, and remove it: compiled kernels, tokens, what a plugin has made.

    With --work-dir also what `qsim evaluate --work-dir DIR` has kept: baselines, statistics and blocks. All of it is
    made again when it is needed.
    """
    if clear is None:
        show(work_dir, as_json)
    else:
        clear_kept(work_dir, clear, yes, as_json)


@dataclass(frozen=True)
class Entry:
    """One thing that is kept: a file, or the files of a folder."""

    kind: str
    model: str
    what: str
    path: Path
    files: tuple[Path, ...]
    """The files that qsim has written. Links, and what others have put beside them, are not among them."""

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
            for folder in (self.path, self.path.parent):
                with contextlib.suppress(OSError):  # it is a file, or something else is in it
                    folder.rmdir()
        except OSError as error:
            raise QsimError(f"cannot remove {self.path}: {error.strerror or error}") from None


def entries(work_dir: Path | None) -> list[Entry]:
    """Everything that is kept in a work directory, if one is named, and for the user. Raises `QsimError`."""
    if work_dir is not None and not work_dir.is_dir():
        raise QsimError(f"there is no directory {work_dir}{file_did_you_mean(work_dir)}")
    return [*(_in(work_dir) if work_dir is not None else ()), *_for_the_user()]


def _kinds_of_a_work_directory() -> tuple[str, ...]:
    from qsim_cache.entry import KINDS

    return (*KINDS, "blocks")


def _in(work_dir: Path) -> Iterator[Entry]:
    from qsim_cache.entry import ENDING, KINDS

    for kind in KINDS:
        for path in _own(work_dir, kind, f"*{ENDING}"):
            said = described(path)
            yield Entry(kind, str(said.get("model", "")), str(said.get("what", "damaged")), path, (path,))
    for folder in sorted(work_dir.glob(STAMP)):
        if blocks := _own(work_dir, folder.name, BLOCK):
            yield Entry("blocks", "", f"{len(blocks)} finished by a transform", folder, blocks)


def _for_the_user() -> Iterator[Entry]:
    """The entries of the user's cache: in the folder of each kind, files and sealed folders named by a digest."""
    for kind, note in _kinds_for_the_user().items():
        for path in _own(user_cache(), kind, f"{STAMP}.*"):
            if path.suffix != LOCK:
                yield Entry(kind, "", note, path, (path,))
        for seal in sorted((user_cache() / kind).glob(f"{STAMP}/*/{SEAL}")):
            folder = seal.parent
            names = [glob.escape(name) for name in sealed(folder) if Path(name).name == name]
            if files := _own(user_cache(), str(folder.relative_to(user_cache())), *names, SEAL):
                yield Entry(kind, folder.name, note, folder, files)


def _own(root: Path, inside: str, *patterns: str) -> tuple[Path, ...]:
    """The files of a folder inside `root` that have such names. Neither they nor a folder on the way is a link."""
    folder = root / inside
    if any(step.is_symlink() for step in (folder, *folder.parents) if root in step.parents):
        return ()
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return tuple(path for path in found if path.is_file() and not path.is_symlink())


def _kinds_for_the_user() -> dict[str, str]:
    """The folders of the user's cache that qsim or a plugin has made, and what each holds."""
    notes = [note for path in sorted(user_cache().glob("*")) for note in _own(user_cache(), path.name, CACHE_NOTE)]
    return {note.parent.name: note.read_text(encoding="utf-8") for note in notes}


def show(work_dir: Path | None, as_json: bool) -> None:
    """Print what there is."""
    found = entries(work_dir)
    if as_json:
        click.echo(_json(found))
        return
    from rich.filesize import decimal
    from rich.table import Table

    from qsim_core.cli.console import console, print_below

    table = Table("kind", "model", "what", "size", "age", box=None, pad_edge=False)
    for entry in found:
        table.add_row(entry.kind, entry.model, entry.what, decimal(entry.bytes), _age(entry.seconds))
    out = console()
    if found:
        out.print(table)
    where = f"{user_cache()}" if work_dir is None else f"{work_dir} and {user_cache()}"
    print_below(out, f"{_many(found)} in {where}")
    if work_dir is None:
        print_below(out, "what `qsim evaluate --work-dir DIR` keeps is shown with --work-dir DIR")


def clear_kept(work_dir: Path | None, kind: str, yes: bool, as_json: bool) -> None:
    """Remove what is kept, of one kind or "all", once it is confirmed. Raises `QsimError`."""
    in_a_work_directory = _kinds_of_a_work_directory()
    known = ["all", *in_a_work_directory, *_kinds_for_the_user()]
    if kind not in known:
        raise QsimError(f"nothing of kind {kind!r} is kept{did_you_mean(kind, known)}")
    if kind in in_a_work_directory and work_dir is None:
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
    rows = [
        {name: str(getattr(entry, name)) for name in ("kind", "model", "what", "path")}
        | {"bytes": entry.bytes, "seconds": round(entry.seconds)}
        for entry in found
    ]
    return json.dumps(rows, indent=2)


def _many(found: list[Entry]) -> str:
    from rich.filesize import decimal

    entry = "entry" if len(found) == 1 else "entries"
    return f"{len(found)} {entry} ({decimal(sum(e.bytes for e in found))})"


def _age(seconds: float) -> str:
    unit, length = next(((u, n) for u, n in UNITS if seconds >= n), UNITS[-1])
    return f"{int(seconds // length)} {unit}"
