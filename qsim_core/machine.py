"""The processor of this machine."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Describe the features of this processor in one line. Code compiled for it runs on any machine with this line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
