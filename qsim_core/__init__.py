"""qsim measures how much quality a model loses when its matmuls run in other number formats.

    >>> import qsim_core as qsim
    >>> qsim.parse("abfp(int4, n=64)")                                    # doctest: +SKIP
    >>> simulation = qsim.simulate(model, weights="int4", activations="token(int8)")   # doctest: +SKIP

The names below are the public ones. Each is imported when it is first used, so that `import qsim_core` is fast
and does not import torch. A plugin adds functions by the entry-point group `qsim.functions`: `qsim.study(...)`.
"""

from __future__ import annotations

from typing import Any

from qsim_core import moved
from qsim_core.lazy import names_of
from qsim_core.version import __version__ as __version__

_named, __all__ = names_of(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name not in __all__ and not name.startswith("_"):
        from qsim_core.components.discovery import functions, import_plugin

        if (plugin := functions().get(name)) is not None:
            return import_plugin(plugin)
    return _named(name)


def __dir__() -> list[str]:
    return sorted(__all__)


moved.install()
