"""Accelerators compute a quantizer's result faster than the reference, with the same bits.

An accelerator is found in the entry-point group `qsim.accelerators`, and is loaded when the first tensor is quantized.
It may decline any call; the reference then computes the result. Without an accelerator the reference computes
everything.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "qsim.accelerators"
log = logging.getLogger(__name__)


class Accelerator(Protocol):
    """Quantizes as the reference does, bit for bit, or declines. One method to write: `quantize`.

    The entry point names an instance. An accelerator may have two more methods: `attend` (see `AttentionAccelerator`)
    and `compiled` (see `CompilingAccelerator`).
    """

    def quantize(self, quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> Tensor | None:
        """Compute `quantizer.quantize(x)`, or quantize `x` under static `scales`; None declines.

        `quantizer` is a `Format` or a `Scheme`. `scales` is a `Scales`, or None; only a `Scheme` has them. The result
        may be put into `out`, which has the shape, strides and dtype of `x`.
        """


@runtime_checkable
class AttentionAccelerator(Accelerator, Protocol):
    """An accelerator that computes fused attention at its sites, too."""

    def attend(self, sites: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        """Compute `explicit_attention(*args, **kwargs)` at the `Sites` of a model; None declines.

        The numbers are those of its two products, computed one after the other at their sites.
        """


@runtime_checkable
class CompilingAccelerator(Accelerator, Protocol):
    """An accelerator that compiles the C++ sources of plugins, too."""

    def compiled(self, source: Path, elements: int) -> Any:
        """Compile a C++ source for this processor and load it; None declines, and Python does the work.

        `elements` is the work of the present call, counted as elements that are quantized. An accelerator may decline
        until the work so far is worth the time of compiling.
        """


_loaded: list[tuple[Accelerator, ...]] = []


def accelerators() -> tuple[Accelerator, ...]:
    """The accelerators in use: the installed ones, sorted by name. One that does not load is logged and left out."""
    if not _loaded:
        found = (_load(entry) for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name))
        _loaded.append(tuple(accelerator for accelerator in found if accelerator is not None))
    return _loaded[-1]


@contextlib.contextmanager
def accelerated_by(*chosen: Accelerator) -> Iterator[None]:
    """Use only these accelerators inside the block; with no argument the reference computes everything."""
    accelerators()
    _loaded.append(chosen)
    try:
        yield
    finally:
        _loaded.pop()


def accelerated(quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> Tensor | None:
    """Quantize by the first accelerator that does not decline; None if every accelerator declines."""
    for accelerator in accelerators():
        found = accelerator.quantize(quantizer, x, scales, out)
        if found is not None:
            return found
    return None


def compiled(source: Path, elements: int) -> Any:
    """Compile a C++ source by the first accelerator that does not decline; None if every accelerator declines.

    See `CompilingAccelerator.compiled`.
    """
    for accelerator in accelerators():
        if isinstance(accelerator, CompilingAccelerator):
            found = accelerator.compiled(source, elements)
            if found is not None:
                return found
    return None


def _load(entry: EntryPoint) -> Accelerator | None:
    try:
        accelerator: Accelerator = entry.load()
    except Exception as error:
        log.warning("accelerator %r is not used: %s: %s", entry.name, type(error).__name__, error)
        return None
    return accelerator
