"""Wheels of several distributions, built in one process, and their content in a directory."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

PROGRAM = """
import os, sys, tomllib
from importlib import import_module

kind, target, *sources = sys.argv[1:]  # a build changes sys.argv
for source in sources:
    os.chdir(source)
    with open("pyproject.toml", "rb") as file:
        backend = import_module(tomllib.load(file)["build-system"]["build-backend"])
    getattr(backend, f"build_{kind}")(target)
"""


def build(sources: Iterable[Path], target: Path, kind: str = "wheel") -> None:
    """Build a wheel (or a "sdist") of each source directory by its backend. A build may leave files in the source."""
    subprocess.run([sys.executable, "-c", PROGRAM, kind, target, *sources], check=True, capture_output=True)


def unpack(wheels: Iterable[Path], target: Path) -> Path:
    """Extract wheels into a directory, which then serves as an entry of `sys.path`."""
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(target)
    return target
