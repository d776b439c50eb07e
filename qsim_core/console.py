"""The console that everything is printed on: plain text where it is a pipe, a file, or `NO_COLOR` is set."""

from __future__ import annotations

import os

from rich.console import Console


def console(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Standard output, or standard error. Names are printed as they are: brackets are no markup.

    `NO_COLOR` (no-color.org), set to anything, takes colours away, and bold and dim with them.
    """
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(
        stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, color_system=None if plain else "auto"
    )
