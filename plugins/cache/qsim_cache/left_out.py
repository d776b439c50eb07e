"""Metrics that are kept for later runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qsim_core.evaluation.metrics import Metrics


class LeftOut(Metrics):
    """Metrics of which only the values without each sample are known. They are enough for intervals."""

    def __init__(self, values: Mapping[str, float], left_out: Mapping[str, Tensor], in_order: bool) -> None:
        super().__init__({}, counts=values, in_order=in_order)
        self._left_out = dict(left_out)

    @property
    def size(self) -> int:
        return len(next(iter(self._left_out.values()))) if self._left_out else 0

    def left_out(self) -> dict[str, Tensor]:
        return self._left_out
