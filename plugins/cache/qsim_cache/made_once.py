"""Values that take long to make, such as the tokens of a long text: they are kept in the user's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from qsim_core.errors import QsimError
from qsim_core.files import keep, kept, make_cache_folder


def made_once(kind: str, note: str, made_from: bytes, make: Callable[[], Any]) -> Any:
    """Read what an earlier run has made from the same bytes and `keep` has written to the user's cache, or make it.

    Where nothing can be kept, each run makes it.
    """
    try:
        path = make_cache_folder(kind, note) / f"{hashlib.sha256(made_from).hexdigest()[:16]}.kept"
    except (OSError, QsimError, RuntimeError):  # RuntimeError: there is no home directory
        return make()
    found = kept(path)
    if found is None:
        found = make()
        keep(path, found)
    return found
