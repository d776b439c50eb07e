"""The circumstances of one evaluation: sizes, progress, the work directory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsim_core.components.discovery import added
from qsim_core.transforms.store import Store

STORE = "work_directory"
"""The function, of a plugin, that makes the store of a run from its work directory."""


@contextmanager
def no_count(total: int, done: int, description: str) -> Iterator[Callable[[str], None]]:
    """Give a function to call after each step that shows nothing."""
    yield lambda text: None


def no_progress(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """The items, and nothing shown."""
    return items


@dataclass(frozen=True)
class Run:
    """The circumstances of one evaluation. Only `limit` and `seed` change what is computed."""

    batch_size: int = 8
    limit: int | None = None
    """At most so many samples (windows, images), the first ones."""
    seed: int = 0
    track: Callable[[Iterable[Any], int, str], Iterable[Any]] = field(default=no_progress)
    """Wraps a loop to show its progress: `for x in run.track(items, total, "perplexity")`."""
    stage: Callable[[str], AbstractContextManager[Any]] = field(default=nullcontext)
    """Surrounds work without a count to show that it goes on: `with run.stage("loading MODEL"):`."""
    count: Callable[[int, int, str], AbstractContextManager[Callable[[str], None]]] = field(default=no_count)
    """Surrounds steps that count themselves: `with run.count(total, done, "training") as step: … step("loss 3.2")`."""
    work_dir: Path | None = None
    """The directory of what later runs can use, from which a run that died goes on."""
    reference: Any = None
    """The `outputs` of the baseline's `Metrics`, for the simulated run; none in the baseline's own."""
    known: dict[int, Tensor] | None = None
    """The numbers of whole batches, by place, that an earlier run of fewer samples has found. `over` adds others."""
    allow_code_execution: bool = False
    """True if an evaluator may run programs that the model wrote."""

    def __post_init__(self) -> None:
        if isinstance(self.work_dir, str):
            object.__setattr__(self, "work_dir", Path(self.work_dir))

    def over(self, batches: Sequence[Any], numbers: Callable[[Any], Tensor], description: str) -> Tensor:
        """Compute numbers `[…, samples]` of each batch, and put them together in float64; progress is shown.

        What is known is not computed again. The last batch may be short, and then is another one in a longer run.
        """
        known = {} if self.known is None else self.known
        found = []
        for place, batch in enumerate(self.track(batches, len(batches), description)):
            if place not in known or place == len(batches) - 1:
                known[place] = numbers(batch).double()
            found.append(known[place])
        if found and found[-1].shape[-1] < self.batch_size:
            del known[len(found) - 1]
        return torch.cat(found, -1)

    @functools.cached_property
    def store(self) -> Store | None:
        """The store of the work directory; None without one. Raises `QsimError` if no plugin brings it."""
        if self.work_dir is None:
            return None
        store: Store = added(STORE, f"keeps the work directory {self.work_dir}")(self.work_dir)
        return store
