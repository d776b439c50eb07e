"""Accelerators: they compute a quantizer's result faster than the reference, with the same bits.

An accelerator is found in the entry-point group `qsim.accelerators`, and is loaded when the first tensor is quantized.
It may decline any call. Without an accelerator the reference computes everything.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qsim_core.components.catalogue import catalogue
from qsim_core.components.discovery import ACCELERATORS, Plugin, import_plugin, installed
from qsim_core.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class Accelerator(Protocol):
    """Quantizes as the reference does, bit for bit, or declines. The entry point names an instance.

    It may have further methods:

        scales(quantizer, x)                  gives `quantizer.scales(x)`, or None
        errors(quantizer, x, y)               sums of x² and of (x - y)² in float64, and counts of non-zero values
                                              that became zero and of values outside the range; or None
        attend(sites, query, key, value, …)   computes fused attention at its sites, or gives None
        compiled(source, elements)            compiles a C++ source of a plugin for this processor, or gives None
        at_once()                             a context manager: what it compiles is compiled at the first call inside
    """

    def quantize(self, quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> Tensor | None:
        """Compute `quantizer.quantize(x)`, or the same under static `scales`; None: the reference has to do it.

        `quantizer` is a `Format` or a `Scheme`. The result may be put into `out`, which has the shape, the strides and
        the dtype of `x`.
        """


_loaded: list[dict[str, Accelerator]] = []


def accelerators() -> tuple[Accelerator, ...]:
    """Give the accelerators in use: those installed, by name. One that does not load is logged and left out."""
    return tuple(accelerators_by_name().values())


def accelerators_by_name() -> dict[str, Accelerator]:
    """Give the accelerators in use by the name of their entry point, or of their class."""
    if not _loaded:
        plugins = installed([ACCELERATORS])[ACCELERATORS]
        described = zip(plugins, catalogue([*plugins.values()]), strict=True)
        found = {name: _load(plugins[name], offers) for name, offers in sorted(described)}
        _loaded.append({name: accelerator for name, accelerator in found.items() if accelerator is not None})
    return _loaded[-1]


@contextlib.contextmanager
def accelerated_by(*chosen: Accelerator) -> Iterator[None]:
    """Use these accelerators inside and no others; without any, the reference computes everything."""
    accelerators()
    _loaded.append({type(accelerator).__name__: accelerator for accelerator in chosen})
    try:
        yield
    finally:
        _loaded.pop()


def at_once(accelerator: Accelerator) -> contextlib.AbstractContextManager[Any]:
    """Make an accelerator compile at its first call inside, and not once that is worth the time."""
    prepare = getattr(accelerator, "at_once", None)
    return contextlib.nullcontext() if prepare is None else prepare()


def accelerated(quantizer: Any, x: Tensor, scales: Any = None, out: Tensor | None = None) -> Tensor | None:
    """Give the first accelerator's result; None if each declines."""
    for accelerator in accelerators_by_name().values():
        found = accelerator.quantize(quantizer, x, scales, out)
        if found is not None:
            return found
    return None


def accelerated_scales(quantizer: Any, x: Tensor) -> Any:
    """Give the first accelerator's scales and zero points of `x`; None if each declines."""
    return _first("scales", quantizer, x)


def accelerated_errors(quantizer: Any, x: Tensor, y: Tensor) -> tuple[float, float, int, int] | None:
    """Give the first accelerator's sums and counts of what quantizing `x` to `y` did; None if each declines."""
    found: tuple[float, float, int, int] | None = _first("errors", quantizer, x, y)
    return found


def compiled(source: Path, elements: int) -> Any:
    """Compile a C++ source for this processor, by the first accelerator that can; None: Python does the work.

    `elements` is the work of this call, in elements that are quantized: compiling has to be worth it.
    """
    return _first("compiled", source, elements)


def _first(method: str, *arguments: Any) -> Any:
    """The first result of accelerators that have a method; None if each declines."""
    for accelerator in accelerators():
        call = getattr(accelerator, method, None)
        if call is not None and (found := call(*arguments)) is not None:
            return found
    return None


def _load(plugin: Plugin, described: Any) -> Accelerator | None:
    try:
        if isinstance(described, PluginError):
            raise described
        accelerator: Accelerator = import_plugin(plugin)
    except PluginError as error:
        log.warning("accelerator %r is not used: %s", plugin.name, error)
        return None
    return accelerator
