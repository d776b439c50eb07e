"""Baselines that an earlier run with the same work directory has measured.

A baseline is found by everything that decides it: model, data, evaluator and their code, options, libraries, machine.
Cached metrics equal measured ones to the last digit.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qsim_cache.entry import CacheEntry
from qsim_cache.fingerprint import Unknowable, of_requirements
from qsim_cache.left_out import LeftOut
from qsim_cache.made_from import of_components, of_machine, of_model
from qsim_core.components.component import components_in
from qsim_core.components.host import Host
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.data import Data
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.metrics import Metrics
from qsim_core.transforms.run import Run


def baseline_entry(
    work_dir: Path, job: Job, host: Host, loaded: LoadedModel, data: Data, run: Run, device: str, dtype: str
) -> CacheEntry | None:
    """The entry of a baseline; None where something that decides it is not known."""
    parts = [job.evaluator, *job.located.components]
    plugins = {plugin for part in parts for c in components_in(part) for plugin in host.plugins_of(c)}
    options = (run.batch_size, run.limit, run.seed, run.allow_code_execution)
    made_from = itertools.chain(
        of_model(loaded.model),
        of_preparation(loaded.tokenizer),
        of_preparation(loaded.processor),
        of_components(*parts),
        (job.evaluator.protocol_for(loaded, data), data.sha256, *options),
        of_machine(device, dtype, loaded.model),
        of_requirements({"qsim-core", *(plugin.distribution for plugin in plugins)}),
    )
    what = f"{job.evaluator}, {data.name}, {dtype}"
    with run.stage("looking for an earlier baseline"):
        return CacheEntry.of(work_dir, "baseline", made_from, model=job.located.name, what=what)


def cached_baseline(
    entry: CacheEntry | None, evaluate: Callable[[], dict[str, float]]
) -> tuple[dict[str, float], bool]:
    """The baseline's metrics, and True if an earlier run had measured them.

    Metrics with `outputs` are not kept, as the simulated run is compared with these.
    """
    if entry is None:
        return evaluate(), False
    kept = entry.get()
    if kept is not None:
        return LeftOut(**kept), True
    metrics = evaluate()
    if isinstance(metrics, Metrics) and metrics.outputs is not None:
        return metrics, False
    in_order = isinstance(metrics, Metrics) and metrics.in_order
    left_out = metrics.left_out() if isinstance(metrics, Metrics) and metrics.size > 1 else {}
    values = {name: float(value) for name, value in metrics.items()}
    found: dict[str, Any] = {"values": values, "left_out": left_out, "in_order": in_order}
    entry.put(found)
    return LeftOut(**found), False


def of_preparation(thing: Any) -> Iterator[Any]:
    """A tokenizer or processor, by the files that its `save_pretrained` writes. Raises `Unknowable` if it has none."""
    if thing is None:
        return
    if not hasattr(thing, "save_pretrained"):
        raise Unknowable(f"{type(thing).__name__} cannot be saved")
    with tempfile.TemporaryDirectory(prefix="qsim-") as folder:
        thing.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            yield from (str(file.relative_to(folder)), file.read_bytes())
