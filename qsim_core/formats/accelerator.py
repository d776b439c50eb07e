"""Accelerators: what computes a quantizer's result faster than the reference, with the same bits.

An accelerator is found in the entry-point group `qsim.accelerators`, is loaded when the first tensor is quantized, and
may decline whatever it does not know. Without one the reference computes everything.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "qsim.accelerators"
log = logging.getLogger(__name__)


class Accelerator(Protocol):
    """Quantizes as the reference does, bit for bit, or declines. The entry point names an instance."""

    def quantize(self, quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> Tensor | None:
        """`quantizer.quantize(x)`, or under static `scales`; None: the reference shall do it.

        `quantizer` is a `Format` or a `Scheme`. The result may be put into `out`, which has the shape, the strides and
        the dtype of `x`.
        """

    # Two more methods are optional:
    #   attend(sites, query, key, value, ...) computes fused attention at its sites, or returns None.
    #   compiled(source, elements) compiles a C++ source of a plugin for this processor, or returns None.


_loaded: list[tuple[Accelerator, ...]] = []


def accelerators() -> tuple[Accelerator, ...]:
    """The accelerators in use: those installed, by name. One that does not load is logged and left out."""
    if not _loaded:
        found = (_load(entry) for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name))
        _loaded.append(tuple(accelerator for accelerator in found if accelerator is not None))
    return _loaded[-1]


@contextlib.contextmanager
def accelerated_by(*chosen: Accelerator) -> Iterator[None]:
    """Use these accelerators inside and no others; without any, the reference computes everything."""
    accelerators()
    _loaded.append(chosen)
    try:
        yield
    finally:
        _loaded.pop()


def accelerated(quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> Tensor | None:
    """The first accelerator's result; None where each declines."""
    for accelerator in accelerators():
        found = accelerator.quantize(quantizer, x, scales, out)
        if found is not None:
            return found
    return None


def compiled(source: Path, elements: int) -> Any:
    """A C++ source compiled for this processor by the first accelerator that can; None: Python does the work.

    `elements` is the work of this call, counted as elements that are quantized: compiling has to be worth it.
    """
    for accelerator in accelerators():
        compile_source = getattr(accelerator, "compiled", None)
        if compile_source is not None and (found := compile_source(source, elements)) is not None:
            return found
    return None


def _load(entry: EntryPoint) -> Accelerator | None:
    try:
        accelerator: Accelerator = entry.load()
    except Exception as error:
        log.warning("accelerator %r is not used: %s: %s", entry.name, type(error).__name__, error)
        return None
    return accelerator
