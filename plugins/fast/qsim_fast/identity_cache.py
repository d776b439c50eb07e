"""Functions of one object that is asked about again and again: its answer is looked up, by which object it is.

Components are equal by their options, and to hash these takes longer than a small matmul.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


def remembered(function: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """The function, asked once about each object as long as that lives; objects must not change."""
    known: dict[int, tuple[weakref.ref[Any], Answer]] = {}

    @functools.wraps(function)
    def ask(about: Any) -> Answer:
        found = known.get(id(about))
        if found is not None and found[0]() is about:  # another one may get its id
            return found[1]
        answer, place = function(about), id(about)
        with contextlib.suppress(TypeError):  # of None, and whatever else does not say when it goes
            known[place] = weakref.ref(about, lambda _: known.pop(place, None)), answer
        return answer

    return ask
