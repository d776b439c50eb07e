"""Files that a kill, a full disk or a flipped bit cannot turn into other numbers, and the directory of qsim's cache.

Every file appears complete or not at all (`writing`). A value that qsim reads back later has a SHA-256 with it (`keep`,
`kept`), which covers the names of the file and of its folder: a file in the place of another does not match. What does
not match is made again. `qsim_cache.sealing` does the same for the files of a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qsim_core.errors import QsimError, file_did_you_mean

PARTIAL = "tmp"
"""The beginning of the name of a file that is being written."""
LOCK = ".lock"
"""The end of the name of a file that keeps a second process waiting. It is empty, and stays."""
DIGEST = "sha256_with_place"
"""The key of the digest in the last line of a kept file."""
LARGEST = 1 << 30
"""Bytes of the largest file that is read as one text."""
LONGEST_NAME = 80
"""Characters of a path that a message shows."""
LONGEST_DESCRIPTION = 2**13
"""Bytes of the longest last line of a kept file."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file to write. It appears at `path` when the block ends; nothing is left if the block fails.

    Raises `QsimError` if the file cannot be written.
    """
    check_writable(path)
    part = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    try:
        with _new(part) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not part.exists():  # it has no name yet
                os.link(f"/proc/self/fd/{file.fileno()}", part, src_dir_fd=file.fileno())
        part.replace(path)
    except OSError as error:
        raise QsimError(f"cannot write {path}: {error.strerror or error}") from None
    finally:  # also after Ctrl-C
        part.unlink(missing_ok=True)


def _new(part: Path) -> BinaryIO:
    """Open a new file: without a name where the system can, so that a kill leaves nothing of it, else as `part`."""
    if os.path.isdir("/proc/self/fd") and hasattr(os, "O_TMPFILE"):
        with contextlib.suppress(OSError):  # the file system cannot
            return os.fdopen(os.open(part.parent, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb")
    return part.open("xb")


def keep(path: Path, value: Any, most: float = math.inf, **about: str) -> None:
    """Write numbers, texts and tensors, in mappings and lists, for `kept`; nothing if they take more than `most` bytes.

    Where it cannot be written, on a full disk, a warning is logged and the run goes on.
    """
    import torch

    buffer = io.BytesIO()  # torch.save hides the error of a full disk
    torch.save(value, buffer)
    if buffer.tell() > most:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checked(path, buffer.getbuffer(), **about)
    except (OSError, QsimError) as error:
        log.warning("nothing is kept for later runs: %s", error)


def kept(path: Path) -> Any:
    """Read back what `keep` wrote; None where there is nothing, or not what was written, which is logged."""
    import pickle

    import torch

    content = read_checked(path)
    try:
        return None if content is None else torch.load(io.BytesIO(content), weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):  # another version of torch wrote it
        return None


def write_checked(path: Path, content: bytes | memoryview, **about: str) -> None:
    """Write content, and a last line of JSON with a description and the SHA-256 of both and of the file's place.

    The place is the names of the file and of its folder. Raises `QsimError`.
    """
    line = json.dumps({**about, DIGEST: _digest(path, content, about)})
    with writing(path) as file:
        file.write(content)
        file.write(b"\n" + line.encode())


def read_checked(path: Path, own: bool = False) -> bytes | None:
    """Read the content that `write_checked` wrote; None where there is nothing, or not what was written.

    With `own`, a file that another user could have written counts as damaged.
    """
    try:
        with path.open("rb") as file:
            if own:
                check_own(path, file.fileno())
            whole = file.read()
        content, about = whole[: whole.rfind(b"\n")], _description(whole)
        if about.pop(DIGEST, None) == _digest(path, content, about):
            return content
        if "sha256" in about:  # a version wrote it whose digest left the place out
            return None
    except FileNotFoundError:
        return None
    except (OSError, QsimError) as error:
        log.warning("%s is not read: %s", path, error)
        return None
    log.warning("%s is damaged: what it held is made again", path)
    return None


def described(path: Path) -> dict[str, Any]:
    """Read the last line of a kept file, its description; empty for a damaged one."""
    try:
        with path.open("rb") as file:
            file.seek(-min(LONGEST_DESCRIPTION, path.stat().st_size), os.SEEK_END)
            return _description(file.read())
    except OSError:
        return {}


def _description(end: bytes) -> dict[str, Any]:
    try:
        said = json.loads(end[end.rfind(b"\n") :])
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _digest(path: Path, content: bytes | memoryview, about: dict[str, Any]) -> str:
    digest = hashlib.sha256(content)
    digest.update(json.dumps([about, *path.absolute().parts[-2:]]).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process of this machine makes what goes to `path`. A file that ends in `.lock` stays beside."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with path.with_suffix(LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def empty(folder: Path) -> Iterator[Path]:
    """Inside, there is a new folder to work in. What a process that was killed has left there goes, too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(text: str | Path) -> Path:
    """The path that a user's text names, with `~` written out. Raises `QsimError` for a text that can name no file."""
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        short = str(text) if len(str(text)) < LONGEST_NAME else f"{str(text)[:LONGEST_NAME]}…"
        raise QsimError(
            f"{short!r} cannot be a file or a directory: {getattr(error, 'strerror', None) or error}"
        ) from None
    return path


def read_text(path: Path, error: type[QsimError] = QsimError, most: int = LARGEST) -> str:
    """Read a file of UTF-8 text of at most so many bytes. Raises `error` for anything else.

    Of what is not a regular file only the pipes of a shell are read: others may never end.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and path.parts[:2] == ("/", "dev")):
            raise error(f"cannot read {path}: it is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}")
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise error(f"cannot read {path}: it has more than {most >> 20} MiB")
        return content.decode()
    except (OSError, ValueError) as found:
        why = getattr(found, "strerror", None) or "it is not UTF-8 text"
        raise error(f"cannot read {path}: {why}{file_did_you_mean(path)}") from None


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
    if path.exists() and not os.access(path, os.W_OK):
        raise QsimError(f"cannot write {path}: it is write-protected; give another name")


def make_work_dir(work_dir: Path) -> None:
    """Make a work directory, before there is anything to keep. Raises `QsimError` where that is impossible."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QsimError(f"cannot use {work_dir} as work directory: {error.strerror}") from None


CACHE_NOTE = ".qsim"
"""The name of the file that marks a folder of the cache. It says in a few words what the folder holds."""


def make_cache_folder(kind: str, note: str) -> Path:
    """Make the folder for one kind of things in the user's cache, which `qsim cache` then lists and clears.

    It is the user's own: others can neither write to it nor read it. Raises `QsimError` if it is another user's.
    """
    folder = cache() / kind
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)
    check_own(folder)
    (folder / CACHE_NOTE).write_text(note, encoding="utf-8")
    return folder


def check_own(path: Path, opened: int | None = None) -> None:
    """Raise `QsimError` if another user could have written a file or a folder of the cache, or what is `opened`."""
    if os.name != "posix":
        return
    found = path.stat() if opened is None else os.fstat(opened)
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise QsimError(f"others can write to {path}; set QSIM_CACHE to a directory of your own")


def cache() -> Path:
    """The directory for files that qsim can make again: $QSIM_CACHE, else `qsim` in the user's cache directory."""
    own = os.environ.get("QSIM_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsim"
