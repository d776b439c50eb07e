"""Writing a file so that it appears complete or not at all, and the directory of qsim's cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qsim_core.errors import QsimError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file to write. It appears at `path` when the block ends, and is deleted if the block fails.

    Raises `QsimError` if the file cannot be written.
    """
    import tempfile

    check_writable(path)
    part: Path | None = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as file:
            part = Path(file.name)
            yield file  # type: ignore[misc]
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
        part = None
    except OSError as error:
        raise QsimError(f"cannot write {path}: {error.strerror or error}") from None
    finally:  # also after Ctrl-C
        if part is not None:
            part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise `QsimError` if no file can be written to `path`. Called before long work whose result goes there."""
    if path.is_dir():
        raise QsimError(f"cannot write {path}: it is a directory; give a file's name")
    if path.exists() and not path.is_file():
        raise QsimError(f"cannot write {path}: it is not a regular file; `--json -` writes to standard output")
    if not path.parent.is_dir():
        raise QsimError(f"cannot write {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise QsimError(f"cannot write {path}: {path.parent} is not writable")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


CACHE_NOTE = ".qsim"
"""The name of the file that marks a folder of the cache. It says in a few words what the folder holds."""


def make_cache_folder(kind: str, note: str) -> Path:
    """Make the folder for one kind of things in the user's cache, which `qsim cache` then lists and clears."""
    folder = cache() / kind
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CACHE_NOTE).write_text(note, encoding="utf-8")
    return folder


def cache() -> Path:
    """The directory for files that qsim can make again: $QSIM_CACHE, else `qsim` in the user's cache directory."""
    own = os.environ.get("QSIM_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsim"
