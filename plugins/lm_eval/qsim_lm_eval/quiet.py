"""Suppress the output of the harness: qsim shows its own progress, and the result contains all notes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress logs, warnings and tqdm's progress bars of all libraries in the `with` block."""
    from tqdm import tqdm

    before, draw = logging.root.manager.disable, tqdm.__init__

    def hidden(self: Any, *arguments: Any, **options: Any) -> None:
        draw(self, *arguments, **{**options, "disable": True})

    logging.disable(logging.ERROR)
    tqdm.__init__ = hidden
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = draw
        logging.disable(before)
