"""Progress on standard error, where that is a terminal: a bar for a loop, a spinner for work without a count."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from qsim_core.console import console


def track(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
    """Show a bar on standard error while a loop runs."""
    columns = (
        TextColumn("{task.description:18}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        yield from progress.track(items, total=total, description=description)


def stage(description: str) -> AbstractContextManager[Any]:
    """Show a spinner on standard error while something without a count goes on."""
    shown = console(stderr=True)
    return shown.status(Text(description)) if shown.is_terminal else nullcontext()


SHOWN: dict[str, Any] = {"track": track, "stage": stage}


def hush_libraries() -> None:
    """transformers, diffusers, accelerate and torchao draw bars and log hints of their own; a command shows qsim's."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for library in ("accelerate", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as of_transformers
    except ImportError:
        return
    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()
