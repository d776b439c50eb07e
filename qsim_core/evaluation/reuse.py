"""What a run can take from an earlier one when only formats have changed: baselines, and what static scales fit.

Both are found again by everything that decides them (`qsim_core.evaluation.fingerprint`), where a work directory is named. What is
taken equals what would have been computed, to the last digit.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from qsim_core.evaluation.fingerprint import Unknowable, of_code, of_machine, of_model
from qsim_core.evaluation.metrics import Metrics, Resampled
from qsim_core.quantizers.observers import Observer
from qsim_core.simulation.static_calibration import Wanted
from qsim_core.simulation.store import Store
from qsim_core.transforms.checkpoint import leaves, sha256

LARGEST = 2**28
"""Bytes of statistics that are worth keeping: blocks along wide rows have a histogram each."""


class Reusable:
    """One entry of a store, computed or not yet."""

    def __init__(self, work_dir: Path, kind: str, made_from: Iterable[Any], **about: str) -> None:
        self.store, self.about = Store(work_dir, kind), about
        self.digest = sha256(itertools.chain([kind], made_from))  # one after another: they may not fit into memory

    def get(self) -> Any:
        """What was kept, numbers, texts and tensors in mappings and lists; None if it is not there."""
        content = self.store.get(self.digest)
        try:
            return None if content is None else torch.load(io.BytesIO(content), weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            return None

    def put(self, value: Any) -> None:
        """Keep it."""
        file = io.BytesIO()
        torch.save(value, file)
        if file.tell() <= LARGEST:
            self.store.put(self.digest, file.getvalue(), **self.about)

    @classmethod
    def of(cls, work_dir: Path | None, kind: str, made_from: Iterable[Any], **about: str) -> Self | None:
        """The entry; None where there is no work directory, or what decides its content cannot be known."""
        try:
            return None if work_dir is None else cls(work_dir, kind, made_from, **about)
        except Unknowable:
            return None

    @classmethod
    def statistics(
        cls, work_dir: Path | None, model: nn.Module, value_axis: str, wanted: Wanted, batches: Sequence[Any]
    ) -> Self | None:
        """What passes the sites that want static scales, in a model that no transform has changed."""
        if work_dir is None:
            return None
        given = [value_axis, *leaves(list(batches))]
        tensors = itertools.chain(model.parameters(), (leaf for leaf in given if isinstance(leaf, Tensor)))
        devices = sorted({str(tensor.device) for tensor in tensors})
        seen = [part for key, observer in wanted.items() for part in (key, *_told(observer))]
        code = of_code(*(type(observer) for observer in wanted.values()))
        made_from = itertools.chain(of_model(model), code, of_machine(" ".join(devices), ""), seen, given)
        name = Path(getattr(model, "name_or_path", "")).name or type(model).__name__
        what = f"{len(wanted)} tensors, {len(batches)} batches"
        return cls.of(work_dir, "statistics", made_from, model=name, what=what)


def baseline(entry: Reusable, seed: int, evaluate: Callable[[], dict[str, float]]) -> tuple[dict[str, float], bool]:
    """The baseline's metrics, and whether an earlier run had found them.

    Where the simulated run is compared with the baseline's outputs, these are wanted too, and nothing is kept.
    """
    kept = entry.get()
    if kept is not None:
        return Resampled(**kept), True
    metrics = evaluate()
    if isinstance(metrics, Metrics) and metrics.outputs is not None:
        return metrics, False
    size = metrics.size if isinstance(metrics, Metrics) else 0
    draws = metrics.resampled(seed) if isinstance(metrics, Metrics) and size > 1 else {}
    found: dict[str, Any] = {
        "values": {name: float(value) for name, value in metrics.items()},
        "size": size,
        "draws": draws,
    }
    entry.put(found)
    return Resampled(**found), False


def _told(observer: Observer) -> Iterator[Any]:
    """What decides what an observer will remember: its class and what it holds before it has seen anything."""
    yield f"{type(observer).__module__}.{type(observer).__qualname__}"
    for name, value in vars(observer).items():
        yield name
        yield from _told(value) if isinstance(value, Observer) else [value]
