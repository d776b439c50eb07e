"""A cell of a study: one model under one recipe in its circumstances, and what was found there."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from qsim_cache.fingerprint import Unknowable, of_code, of_requirements, sha256
from qsim_cache.left_out import LeftOut

from qsim_core import Calibration, Metrics, QsimError, Recipe, Result, Run
from qsim_core.components.component import Component, components_in
from qsim_core.components.host import Host
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.locate import Located, default_model, locate
from qsim_core.files import place
from qsim_study.histograms import Histogram


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Circumstances(_Frozen):
    """Everything beside model and recipe that decides a number."""

    data: str | None = Field(None, description="a file, or a name for `datasets`; none: the model's own")
    limit: PositiveInt | None = Field(None, description="samples at most")
    seed: NonNegativeInt = Field(0, description="seed of drawn samples")
    batch_size: PositiveInt = Field(8, description="samples computed at a time")
    dtype: str = Field("float32", description="arithmetic of the model and the simulation")
    device: str = Field("cpu", description="where to compute")
    calibration_data: str | None = Field(None, description="data that transforms look at; none: the model's own")
    calibration_samples: PositiveInt = Field(32, description="samples of the calibration")
    calibration_seqlen: PositiveInt | None = Field(None, description="tokens of a sample; none: a window's")
    calibration_seed: NonNegativeInt | None = Field(None, description="seed that draws them; none: `seed`")
    on: tuple[str, ...] = Field((), description="hardware that says what a batch costs")
    histograms: tuple[str, ...] = Field((), description="patterns of sites of which values are counted")
    blame: NonNegativeInt = Field(0, description="samples from which the cost of each site is predicted; 0: not at all")

    def calibration(self) -> Calibration:
        """The choice of calibration data."""
        return Calibration(
            self.calibration_data, self.calibration_samples, self.calibration_seqlen, self.calibration_seed
        )

    def run(self, run: Run) -> Run:
        """The same run with these sizes and this seed."""
        shown = {key: getattr(run, key) for key in ("track", "stage", "count", "work_dir", "allow_code_execution")}
        return Run(self.batch_size, self.limit, self.seed, **shown)


class Cell(_Frozen):
    """One model under one recipe."""

    model: str | None
    recipe: dict[str, Any]
    circumstances: Circumstances = Circumstances()
    varied: dict[str, str] = Field(default={}, description="the values by which it differs from other cells")
    needs: dict[str, str] = Field(default={}, description="distributions of the plugins that it needs, and versions")
    batches: str = Field(default="", description="the key of the same cell with any number of samples")

    @property
    def label(self) -> str:
        """The values by which it differs from other cells, in one line."""
        return ", ".join(f"{key}={value}" for key, value in self.varied.items())

    @property
    def recipe_label(self) -> str:
        """The same without the model."""
        return ", ".join(
            value if key == "recipe" else f"{key}={value}" for key, value in self.varied.items() if key != "model"
        )

    def recipe_of(self, host: Host) -> Recipe:
        """The recipe, with the model."""
        return Recipe.of(self.recipe | {"model": self.model}, host)

    def planned(self, host: Host) -> tuple[str, Cell]:
        """The cell with what it needs, and its key: the SHA-256 of all that decides its numbers but the machine.

        That are texts, code, versions, and the bytes of model and data. Of a model that cannot be found only its name
        counts, as nothing is computed.
        """
        parts, source = self._parts(host)
        plugins = {plugin for part in parts for plugin in host.plugins_of(part)}
        needs = {plugin.distribution: plugin.version for plugin in sorted(plugins, key=lambda plugin: plugin.name)}
        beside = {"varied": True, "needs": True, "batches": True}
        said = self.model_dump_json(exclude=beside)
        unlimited = self.model_dump_json(exclude=beside | {"circumstances": {"limit"}})
        files = (source, self.circumstances.data, self.circumstances.calibration_data, *_named_files(parts))
        code = _of_code(frozenset(map(type, parts))), _of_requirements(frozenset({"qsim-core", *needs}))
        made_from = [*map(str, parts), *itertools.chain.from_iterable(map(_of_files, files)), *code]
        batches = sha256([unlimited, *made_from])[:32]
        return sha256([said, *made_from])[:32], self.model_copy(update={"needs": needs, "batches": batches})

    def _parts(self, host: Host) -> tuple[list[Component], str | None]:
        """The components that have a part in it, and the place of the model's files."""
        recipe = self.recipe_of(host)
        try:
            located = _located(host, self.model)
            job = Job.at(located, recipe, host)
        except QsimError:
            return [*components_in(recipe)], None
        return [*components_in(job.recipe), *located.components], located.source


@lru_cache
def _located(host: Host, model: str | None) -> Located:
    return locate(default_model(host) if model is None else model, host)


def _named_files(parts: list[Component]) -> Iterator[str]:
    """The files that components name as their options."""
    for part in parts:
        yield from (str(value) for _, value in part if isinstance(value, Path))


@lru_cache
def _of_code(classes: frozenset[type]) -> str:
    """The digest of the code of classes and of the core; of a class that was typed in only its name counts."""
    try:
        return sha256(of_code(*classes))
    except Unknowable:
        return sha256(sorted(cls.__qualname__ for cls in classes))


@lru_cache
def _of_requirements(distributions: frozenset[str]) -> str:
    return sha256(of_requirements(distributions))


@lru_cache
def _of_files(source: str | None) -> tuple[str, ...]:
    """The digests of a file, or of the files of a directory, by their bytes; of anything else its name."""
    if source is None:
        return ()
    path = place(source)
    if not path.exists():
        return (source,)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return tuple(part for file in files for part in (file.name, _digest(file)))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Scores(_Frozen):
    """Metrics, and each metric without the first sample, without the second, and so on."""

    values: dict[str, float]
    left_out: dict[str, list[float]] = {}
    in_order: bool = False

    @classmethod
    def of(cls, metrics: dict[str, float]) -> Scores:
        """Take from an evaluator's metrics what comparisons need."""
        values = {name: float(value) for name, value in metrics.items()}
        if not isinstance(metrics, Metrics) or metrics.size < 2:
            return cls(values=values)
        left_out = {name: found.tolist() for name, found in metrics.left_out().items()}
        return cls(values=values, left_out=left_out, in_order=metrics.in_order)

    def metrics(self) -> Metrics:
        """The metrics, ready to be compared."""
        left_out = {name: torch.tensor(found, dtype=torch.float64) for name, found in self.left_out.items()}
        return LeftOut(self.values, left_out, self.in_order)


class SiteCosts(_Frozen):
    """The predicted cost of each site in the loss, by part; or the reason why there is none."""

    costs: dict[str, dict[str, float]] = {}
    reason: str | None = None


class Entry(_Frozen):
    """The end of one cell: a result, or the reason why there is none."""

    cell: Cell
    result: Result | None = None
    scores: Scores | None = Field(None, description="the simulated metrics with their samples")
    higher_is_better: bool = False
    histograms: list[Histogram] = []
    blame: SiteCosts | None = None
    failure: str | None = Field(None, description="the reason in one line")
    seconds: float = 0.0
    worker: str = ""
