"""Functions of one object that is asked about again and again: its answer is looked up, by which object it is.

Components are equal by their options, and to hash these takes longer than a small matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")
MOST = 1024
"""Objects that are remembered; then all are forgotten."""


def remembered(function: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """The function, asked once about each object; objects must not change."""
    known: dict[int, tuple[Any, Answer]] = {}  # with the object itself, so that no other one gets its id

    @functools.wraps(function)
    def ask(about: Any) -> Answer:
        found = known.get(id(about))
        if found is None:
            if len(known) >= MOST:
                known.clear()
            found = known[id(about)] = about, function(about)
        return found[1]

    return ask
