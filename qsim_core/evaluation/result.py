"""The record of one evaluation: the recipe, the data, the machine, and the metrics."""

from __future__ import annotations

from math import isfinite, nan
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsim_core.components.component import explain
from qsim_core.errors import QsimError
from qsim_core.files import read_text, writing
from qsim_core.simulation.audit import Audit
from qsim_core.simulation.environment import Environment
from qsim_core.transforms.report import LayerReport

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class PluginRecord(_Record):
    distribution: str
    version: str


class DataRecord(_Record):
    name: str
    sha256: str
    source: str | None = Field(None, description="the --data it was read from; none: the data that go with the model")


class CalibrationRecord(DataRecord):
    """The data for transforms and static scales."""

    samples: int = Field(ge=1, lt=2**31)
    length: int | None = Field(ge=2, lt=2**31, description="tokens of a sample; none: what the evaluator takes")
    seed: int | None = Field(None, ge=0, lt=2**63, description="seed that draws the samples; none: the run's")


class Intervals(_Record):
    """The lowest and the highest value of one metric's 95% confidence intervals."""

    baseline: tuple[float, float]
    simulated: tuple[float, float]
    ratio: tuple[float, float] = Field(description="simulated over baseline, of the same samples")
    difference: tuple[float, float] = Field(description="simulated less baseline, of the same samples")


class Result(_Record):
    """One evaluation. `qsim evaluate --from FILE` runs it again from this record."""

    schema_version: int = SCHEMA_VERSION
    model: str
    adapter: str
    weights: str = Field("", description="digest of the parameters and buffers as they were loaded, in this dtype")
    recipe: dict[str, Any] = Field(description="weights, activations, outputs, transforms, skip, overrides as text")
    evaluator: str
    protocol: str = Field(description="what exactly was measured, in words")
    metric: str = Field(description="the metric to look at first")
    baseline: dict[str, float] = Field(description="the model as it is, metric by metric")
    baseline_of: str | None = Field(None, description="another model that the baseline is of; none: this one")
    simulated: dict[str, float] = Field(description="the model under the recipe")
    alone: bool = Field(False, description="true if the recipe quantizes nothing: the model was measured once")
    intervals: dict[str, Intervals] = Field(default={}, description="95% confidence intervals, metric by metric")
    samples: int | None = Field(None, description="samples that the intervals come from; too few have no intervals")
    audit: Audit
    plugins: dict[str, PluginRecord] = Field(description="every plugin that had a part in it")
    environment: Environment
    data: DataRecord
    calibration: CalibrationRecord | None = Field(None, description="what the transforms looked at")
    transforms: list[LayerReport] = Field(default=[], description="what each transform did, layer by layer")
    warnings: list[str] = Field(default=[], description="what can hardly be right in the calibration, with the site")
    batch_size: int = Field(ge=1, lt=2**31)
    limit: int | None = Field(ge=1, lt=2**31)
    seed: int = Field(ge=0, lt=2**63)
    seconds: dict[str, float] = Field(description="baseline, simulated, total")
    cached: list[str] = Field(default=[], description="what an earlier run with this work directory had computed")

    @property
    def ratio(self) -> float:
        """Simulated over baseline, of the first metric; NaN where the baseline is zero or infinite."""
        before = self.baseline[self.metric]
        return self.simulated[self.metric] / before if before and isfinite(before) else nan

    def write(self, path: Path) -> None:
        """Write JSON to a file, whole or not at all. Raises `QsimError`."""
        with writing(path) as file:
            file.write(self.model_dump_json(indent=2).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a record back. Raises `QsimError` if the file is not a record."""
        text = read_text(path)
        try:
            result = cls.model_validate_json(text)
        except ValidationError as error:
            broken = error.errors()[0]["type"] == "json_invalid"
            raise QsimError(f"{path} is no qsim result: {'it is not JSON' if broken else explain(error)}") from None
        if result.schema_version != SCHEMA_VERSION:
            raise QsimError(f"{path} has schema {result.schema_version}; this qsim reads schema {SCHEMA_VERSION}")
        return result
