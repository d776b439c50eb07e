"""The record of a search: the recipe that was found, the way to it, and uniform recipes beside it."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from qsim_core import Result
from qsim_core.evaluation.result import CalibrationRecord
from qsim_core.files import writing


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Budget(_Record):
    """The most that a recipe may cost; what is not said is not limited."""

    model_config = ConfigDict(frozen=True)

    bits: float | None = Field(None, gt=0, description="mean bits of the quantized weights, scales counted")
    bytes: float | None = Field(None, gt=0, description="bytes of the quantized weights, scales counted")
    bops: float | None = Field(None, gt=0, description="bit operations of a forward of the evaluator's example")
    ms: float | None = Field(None, gt=0, description="milliseconds of the same forward on the hardware")

    @property
    def said(self) -> bool:
        """True if anything is limited."""
        return any(value is not None for value in (self.bits, self.bytes, self.bops, self.ms))


class GroupRecord(_Record):
    """A group of sites, and the choice that it got."""

    group: str
    sites: list[str]
    choice: dict[str, str | None] = Field(description="by key of a recipe, the quantizer; none: left as it is")
    bits: float | None = Field(description="mean bits of its weights, scales counted; none: it has no weight")
    sensitivity: float = Field(description="loss that this choice adds alone, in a model that is not quantized")


class Round(_Record):
    """One integer program, and the loss of its solution: its divergence from the unquantized model."""

    around: str = Field(description="the allotment at which sensitivities were measured")
    predicted: float
    loss: float


class Uniform(_Record):
    """A recipe that gives every group the same choice, measured on the data of the evaluation."""

    choice: dict[str, str | None]
    fits: bool = Field(description="true: it keeps the budget, and has the least loss of those that do")
    costs: dict[str, float]
    value: float = Field(description="the metric")
    ratio: tuple[float, float] | None = Field(
        description="95% interval of found over uniform, of the same samples; none: too few samples"
    )

    def verdict(self, higher_is_better: bool) -> str:
        """Compare the found recipe with this one: better or worse if the interval excludes 1, else a tie."""
        if self.ratio is None or not all(map(isfinite, self.ratio)):
            return "not decided: too few samples"
        low, high = self.ratio
        if low <= 1 <= high:
            return "a tie"
        return "better" if (low > 1) == higher_is_better else "worse"


class Found(_Record):
    """A search: the recipe, its evaluation, and uniform recipes on the same data."""

    recipe: str = Field(description="the recipe that was found, as YAML")
    result: Result = Field(description="its evaluation; the data had no part in the search")
    budget: Budget
    costs: dict[str, float]
    groups: list[GroupRecord]
    uniform: list[Uniform]
    higher_is_better: bool
    samples: CalibrationRecord = Field(description="the samples on which losses were measured")
    losses: dict[str, float] = Field(description="mean divergence from the unquantized model: uniform, found")
    rounds: list[Round]
    runs: int = Field(description="recipes that were measured on the samples")
    seconds: float
    warnings: list[str] = []

    @property
    def value(self) -> float:
        """The metric under the recipe that was found."""
        return self.result.simulated[self.result.metric]

    def write(self, path: Path) -> None:
        """Write JSON to a file, whole or not at all. Raises `QsimError`."""
        with writing(path) as file:
            file.write(self.model_dump_json(indent=2).encode() + b"\n")
