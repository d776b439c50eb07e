"""Progress on standard error, where that is a terminal: a bar for a loop, a spinner for work without a count."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from qsim_core.cli.console import console


def track(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
    """Show a bar on standard error while a loop runs."""
    with _bar() as progress:
        yield from progress.track(items, total=total, description=description)


@contextmanager
def count(total: int, done: int, description: str) -> Iterator[Callable[[str], None]]:
    """Show a bar that each call moves on by a step, and what the call says of it."""
    with _bar() as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda text: progress.update(task, advance=1, description=text)


def stage(description: str) -> AbstractContextManager[Any]:
    """Show a spinner on standard error while something without a count goes on."""
    shown = console(stderr=True)
    return shown.status(Text(description)) if shown.is_terminal else nullcontext()


SHOWN: dict[str, Any] = {"track": track, "stage": stage, "count": count}


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description:18}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = console(stderr=True)
    return Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal)


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
