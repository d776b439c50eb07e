"""Entries that runs keep in a work directory for later runs: a file for each, named by what it was made from.

A file is one line of JSON, which describes the entry, and the content, whose SHA-256 is in that line. It is written
whole or not at all, so several runs may share a directory; two of them may compute the same entry. A damaged file is
ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from qsim_core.errors import QsimError
from qsim_core.files import writing

ENDING = ".kept"
KINDS = ("baseline", "statistics")
"""Metrics of models as they are, and what static scales are fitted to."""

log = logging.getLogger(__name__)


class Store:
    """The entries of one kind in a work directory."""

    def __init__(self, work_dir: Path, kind: str) -> None:
        self.directory = work_dir / kind

    def get(self, digest: str) -> bytes | None:
        """The content that was kept under a digest; None where there is none, or not what was written."""
        try:
            line, _, content = self._file(digest).read_bytes().partition(b"\n")
            whole = json.loads(line)["sha256"] == hashlib.sha256(content).hexdigest()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return content if whole else None

    def put(self, digest: str, content: bytes, **about: str) -> None:
        """Keep content for later. Where that is impossible, on a full disk, a warning is logged and the run goes on."""
        line = json.dumps({**about, "sha256": hashlib.sha256(content).hexdigest()})
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with writing(self._file(digest)) as file:
                file.write(line.encode() + b"\n" + content)
        except (OSError, QsimError) as error:
            log.warning("nothing is kept for later runs: %s", error)

    def _file(self, digest: str) -> Path:
        return self.directory / f"{digest}{ENDING}"


def make(work_dir: Path) -> None:
    """Make a work directory, before there is anything to keep. Raises `QsimError` where that is impossible."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QsimError(f"cannot use {work_dir} as work directory: {error.strerror}") from None


def about(path: Path) -> dict[str, Any]:
    """Read the description in the first line of an entry; empty for a damaged one."""
    try:
        with path.open("rb") as file:
            said = json.loads(file.readline(2**16))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
