"""The base class of post-training methods."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from qsim_core.components.component import Component
from qsim_core.matmuls.low_rank import LowRank

if TYPE_CHECKING:
    from qsim_core.transforms.context import Context


class Transform(Component):
    """A post-training method that rewrites a model before its weights are quantized."""

    kind: ClassVar[str] = "transform"
    hook: ClassVar[str] = "qsim_transforms"

    def beside(self, rows: int, columns: int) -> LowRank | None:
        """The factors that it puts beside a quantized weight [rows, columns], on torch's meta device; None: none."""
        return None

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> None:
        """Change the model in place. `context` has its matmuls, calibration data and blocks, and takes reports."""
