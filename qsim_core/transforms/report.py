"""A record of what a transform did to a layer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LayerReport(BaseModel):
    """The report of one transform about one layer."""

    model_config = ConfigDict(frozen=True)

    transform: str
    layer: str
    before: float | None = Field(None, description="the error that the layer would have had")
    after: float | None = Field(None, description="the error that it has")
    measure: str = Field("", description="the measure of `before` and `after`")
    changed: bool = Field(False, description="true if the transform changed a parameter of it, or its site")
    seconds: float = 0.0
    note: str = Field("", description="a remark: why a layer was left alone, what was retried")
