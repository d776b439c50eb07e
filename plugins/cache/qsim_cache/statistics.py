"""Statistics for static scales that an earlier run with the same work directory has gathered.

They serve other formats and calibrators too. Cached statistics equal computed ones to the last digit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qsim_cache.entry import CacheEntry
from qsim_cache.fingerprint import of_code
from qsim_cache.made_from import leaves, of_machine, of_model
from qsim_core.quantizers.observers import Observer
from qsim_core.simulation.static_calibration import Wanted


def statistics_entry(
    work_dir: Path, model: nn.Module, value_axis: str, wanted: Wanted, batches: Sequence[Any]
) -> CacheEntry | None:
    """The entry for the tensors at sites that want static scales, in a model that no transform has changed."""
    given = [value_axis, *leaves(list(batches))]
    tensors = itertools.chain(model.parameters(), (leaf for leaf in given if isinstance(leaf, Tensor)))
    devices = sorted({str(tensor.device) for tensor in tensors})
    seen = [part for key, observer in wanted.items() for part in (key, *_described(observer))]
    code = of_code(*(type(observer) for observer in wanted.values()))
    made_from = itertools.chain(of_model(model), code, of_machine(" ".join(devices), "", model), seen, given)
    name = Path(getattr(model, "name_or_path", "")).name or type(model).__name__
    what = f"{len(wanted)} tensors, {len(batches)} batches"
    return CacheEntry.of(work_dir, "statistics", made_from, model=name, what=what)


def _described(observer: Observer) -> Iterator[Any]:
    """Everything that decides what an observer will gather: its class, and its state before the first tensor."""
    yield f"{type(observer).__module__}.{type(observer).__qualname__}"
    for name, value in vars(observer).items():
        yield name
        yield from _described(value) if isinstance(value, Observer) else [value]
