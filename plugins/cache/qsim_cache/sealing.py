"""Folders whose files a kill, a full disk or a flipped bit cannot change unseen: the SHA-256 of each file is kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from qsim_core.errors import QsimError
from qsim_core.files import writing

SEAL = "sha256.json"
"""The name of the file that holds the digests of the other files of a folder."""


def seal(folder: Path, pattern: str = "*") -> None:
    """Write the SHA-256 of each file of a folder, last of all: from then on it is complete. Raises `QsimError`."""
    try:
        files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        for path in files:  # another library may have written it
            with path.open("rb") as file:
                os.fsync(file.fileno())
        digests = {path.relative_to(folder).as_posix(): _sha256_of(path) for path in files}
    except OSError as error:
        raise QsimError(f"cannot read {folder}: {error.strerror}") from None
    digests.pop(SEAL, None)
    with writing(folder / SEAL) as file:
        file.write(json.dumps(digests, indent=2).encode() + b"\n")


def sealed(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a folder as `seal` met it; empty if there is no seal, or a damaged one."""
    try:
        digests = dict(json.loads((folder / SEAL).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}
    return {str(name): str(digest) for name, digest in digests.items()}


def damaged(folder: Path, *needed: str) -> list[str]:
    """Name the files of a folder that are not as `seal` met them, or that are needed and were not there then."""
    digests = sealed(folder)
    missing = [name for name in (*needed, *(() if digests else [SEAL])) if name not in digests]
    return missing + [name for name, digest in digests.items() if _changed(folder / name, digest)]


def _changed(path: Path, digest: str) -> bool:
    try:
        return _sha256_of(path) != digest
    except OSError:
        return True


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
