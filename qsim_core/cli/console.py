"""The console that everything is printed on: plain text where it is a pipe, a file, or `NO_COLOR` is set."""

from __future__ import annotations

import os
import sys
import textwrap

from rich.console import Console

WIDEST = 500


def console(*, stderr: bool = False, soft_wrap: bool = False, rows: bool = False) -> Console:
    """Standard output, or standard error. Names are printed as they are: brackets are not markup.

    `NO_COLOR` (no-color.org), set to anything, takes colours away, and bold and dim with them. With `rows` a row of a
    table is one line, for grep, where neither a terminal nor `COLUMNS` says how wide lines are.
    """
    plain = bool(os.environ.get("NO_COLOR"))
    free = rows and not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(
        stderr=stderr,
        soft_wrap=soft_wrap,
        highlight=False,
        markup=False,
        color_system=None if plain else "auto",
        width=WIDEST if free else None,
    )


def print_below(out: Console, line: str) -> None:
    """Print a dim line under a table, wrapped between words. A word that is too long, as a path may be, stays whole."""
    wrapped = textwrap.fill(line, out.width, break_long_words=False, break_on_hyphens=False)
    out.print(wrapped, style="dim", soft_wrap=True)
