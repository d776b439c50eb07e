"""A record of what a transform did to a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    pass


class LayerReport(BaseModel):
    """What one transform did to one layer."""

    model_config = ConfigDict(frozen=True)

    transform: str
    layer: str
    before: float | None = Field(None, description="the error that the layer would have had")
    after: float | None = Field(None, description="the error that it has")
    measure: str = Field("", description="what `before` and `after` are")
    seconds: float = 0.0
    note: str = Field("", description="what else there is to say: why a layer was left alone, what was retried")
