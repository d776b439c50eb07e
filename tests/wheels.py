"""Wheels of several distributions, built in one process, and their content in a directory."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

PROGRAM = """
import os, sys
from setuptools import build_meta

wheels, *sources = sys.argv[1:]  # a build changes sys.argv
for source in sources:
    os.chdir(source)
    build_meta.build_wheel(wheels)
"""


def build(sources: Iterable[Path], wheels: Path) -> None:
    """Build a wheel of each source directory by setuptools. A build leaves files in the source."""
    subprocess.run([sys.executable, "-c", PROGRAM, wheels, *sources], check=True, capture_output=True)


def unpack(wheels: Iterable[Path], target: Path) -> Path:
    """Extract wheels into a directory, which then serves as an entry of `sys.path`."""
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(target)
    return target
