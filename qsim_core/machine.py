"""The machine that numbers are computed on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The features of this processor, on which code that was made for it relies."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
