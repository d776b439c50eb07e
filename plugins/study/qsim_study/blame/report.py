"""The answer of `blame`, as JSON has it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qsim_core.evaluation.result import DataRecord, PluginRecord
from qsim_core.simulation.environment import Environment


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Cost(_Record):
    """The amount by which the metric gets worse, measured on the same samples."""

    value: float
    interval: tuple[float, float] | None = Field(None, description="95%; none: too few samples")


class SiteBlame(_Record):
    """One matmul: its predicted cost, and its measured one."""

    site: str
    roles: dict[str, str] = Field(description="the quantizers by role")
    arithmetic: str = Field(description="the arithmetic that the recipe names")
    predicted: float = Field(description="cost in the loss (nats for each token of a text), half-way to the recipe")
    error: float = Field(description="standard error of the predicted cost")
    parts: dict[str, float] = Field(description="the predicted cost by part: element, scale, clipping, arithmetic")
    fisher: float = Field(description="half the sum of (g . dy)^2: the divergence that the site causes alone")
    alone: Cost | None = Field(None, description="the cost of the recipe at this site only")
    left_out: Cost | None = Field(None, description="the cost of the recipe less that of the recipe without this site")


class Blame(_Record):
    """The sites of a recipe, with the highest predicted cost first."""

    schema_version: int = 1
    model: str
    adapter: str
    recipe: dict[str, Any]
    evaluator: str
    protocol: str
    metric: str = Field(description="the metric of the measured costs")
    sites: list[SiteBlame]
    whole: Cost | None = Field(None, description="the cost of the whole recipe; none: nothing was measured")
    tau: float | None = Field(None, description="Kendall's tau of predicted and measured costs of single sites")
    tau_left_out: float | None = Field(None, description="the same of the costs that leave one site out")
    tau_fisher: float | None = Field(None, description="the same of Fisher terms and measured costs of single sites")
    labels: int = Field(description="labels of the gradient pass")
    samples: int = Field(description="samples of the gradient pass")
    limit: int | None
    seed: int
    data: DataRecord
    plugins: dict[str, PluginRecord]
    environment: Environment
    notes: list[str] = Field(default=[], description="what could not be told apart, and doubts")
    seconds: dict[str, float] = Field(description="prediction, verification, total")

    @property
    def predicted(self) -> float:
        """The predicted cost of the whole recipe, in the loss."""
        return sum(site.predicted for site in self.sites)

    @property
    def verified(self) -> list[SiteBlame]:
        """The sites whose cost was measured by a run of the site alone."""
        return [site for site in self.sites if site.alone is not None]
