"""The parts of a result that describe the run, and the way back from a result to its recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qsim_core.components.component import Component, components_in
from qsim_core.components.host import Host
from qsim_core.errors import DataError
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.data import Calibration, Data
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.result import CalibrationRecord, DataRecord, PluginRecord, Result
from qsim_core.files import place
from qsim_core.simulation.recipe import Recipe


def description(job: Job, loaded: LoadedModel, data: Data, host: Host, others: Iterable[Component]) -> dict[str, Any]:
    """The model, the recipe, the evaluator and the plugins of a run with these other components."""
    return {
        "model": job.located.name,
        "adapter": str(job.located.adapter),
        "recipe": job.recipe.record(),
        "evaluator": str(job.evaluator),
        "protocol": job.evaluator.protocol_for(loaded, data),
        "plugins": _plugins([job.recipe, *job.located.components, *others], host),
    }


def data_record(source: str | None, data: Data) -> DataRecord:
    """The data, and the name or path that they were read from."""
    return DataRecord(name=data.name, sha256=data.sha256, source=from_anywhere(source))


def calibration_record(given: Calibration, data: Data) -> CalibrationRecord:
    """The calibration data, their source and their size."""
    source = from_anywhere(given.source)
    return CalibrationRecord(
        name=data.name, sha256=data.sha256, source=source, samples=given.samples, length=given.length, seed=given.seed
    )


def from_anywhere(source: str | None) -> str | None:
    """A path that a record can be run again with from any directory; a name stays as it is."""
    return source if source is None or not place(source).exists() else str(place(source).resolve())


def recipe_of(result: Result, host: Host) -> Recipe:
    """The recipe that a record was made with."""
    return Recipe.of({**result.recipe, "model": result.model, "evaluate": result.evaluator}, host)


def same_data(result: Result, rerun: Result) -> None:
    """Raise `DataError` if the data of a record have changed."""
    if result.data.sha256 != rerun.data.sha256:
        raise DataError(
            f"the data {result.data.name!r} have changed since the record was made "
            f"({result.data.sha256[:12]} then, {rerun.data.sha256[:12]} now); the numbers do not compare"
        )


def _plugins(parts: list[Any], host: Host) -> dict[str, PluginRecord]:
    """Every plugin that offers one of these components, or a component inside them."""
    found = {plugin for part in parts for component in components_in(part) for plugin in host.plugins_of(component)}
    plugins = sorted(found, key=lambda plugin: plugin.name)
    return {p.name: PluginRecord(distribution=p.distribution, version=p.version) for p in plugins}
