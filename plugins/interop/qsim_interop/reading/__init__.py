"""Read quantized checkpoints: codes, scales, zero points, and the recipe that they stand for.

    >>> from qsim_interop.reading import open_checkpoint
    >>> checkpoint = open_checkpoint("DIR")                                       # doctest: +SKIP
    >>> weight = checkpoint.read(checkpoint.layers[0]).dequantize()               # doctest: +SKIP

Each name below is imported when it is first used, so that the command line stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Layer": "packed_weight",
    "PackedWeight": "packed_weight",
    "Reader": "reader",
    "examine": "findings",
    "open_checkpoint": "checkpoint",
}

__all__ = ["Layer", "PackedWeight", "Reader", "examine", "open_checkpoint"]

if TYPE_CHECKING:
    from qsim_interop.reading.checkpoint import open_checkpoint as open_checkpoint
    from qsim_interop.reading.findings import examine as examine
    from qsim_interop.reading.packed_weight import Layer as Layer
    from qsim_interop.reading.packed_weight import PackedWeight as PackedWeight
    from qsim_interop.reading.reader import Reader as Reader


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qsim_interop.reading.{_HOME[name]}"), name)
