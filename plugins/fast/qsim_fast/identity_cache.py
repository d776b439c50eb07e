"""Cache the results of a function of one object by the object's identity.

Components are equal by their options. To hash these takes longer than a small matmul.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def cached_by_identity(function: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Call the function once for each object, and keep the result while the object lives. Objects must not change."""
    kept: dict[int, tuple[weakref.ref[Any], Result]] = {}

    @functools.wraps(function)
    def cached(argument: Any) -> Result:
        found = kept.get(id(argument))
        if found is not None and found[0]() is argument:  # after an object is freed, another may get its id
            return found[1]
        result, identity = function(argument), id(argument)
        with contextlib.suppress(TypeError):  # None and some other objects have no weak references
            kept[identity] = weakref.ref(argument, lambda _: kept.pop(identity, None)), result
        return result

    return cached
