"""The base class of evaluators: what turns a model and data into metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from qsim_core.components.component import Component
from qsim_core.errors import DataError
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.data import Data
from qsim_core.transforms.run import Run

if TYPE_CHECKING:
    pass


class Evaluator(Component):
    """Turns a model and data into metrics. One method to write: `evaluate`."""

    kind: ClassVar[str] = "evaluator"
    hook: ClassVar[str] = "qsim_evaluators"
    metric: ClassVar[str] = ""
    """The metric that a table shows first; empty: the first one that there is."""
    higher_is_better: ClassVar[bool] = False

    @abstractmethod
    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> dict[str, float]:
        """The metrics by name; deterministic for the same model, data and run. `Metrics` have confidence intervals."""

    def read(self, source: str, split: str = "test") -> Data:
        """The data that a path or name stands for; of a data set's parts `split`, if the name says no other. Raises
        `DataError`."""
        raise DataError(f"{self.name} cannot read data; leave --data out")

    def default_data(self) -> Data | None:
        """What is measured on when nothing is named: noise needs no file; none: the data that the model comes with."""
        return None

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Batches of one sample each for transforms to look at, drawn by `seed`. Raises `DataError`."""
        raise DataError(f"{self.name} makes no calibration batches; use an evaluator that does, or Python")

    def training(self, loaded: LoadedModel, data: Data, length: int | None) -> Sequence[dict[str, torch.Tensor]]:
        """What the model is trained on: samples of `length` tokens (none: what the evaluator takes), each the keyword
        arguments of a forward that gives a `loss`, without the axis of a batch. Raises `DataError`."""
        raise DataError(f"{self.name} makes no training samples; use an evaluator that does, or Python")

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any] | None:
        """One small batch, as keyword arguments of the model's forward: finds the sites, feeds the audit."""
        return None

    def protocol(self, loaded: LoadedModel) -> str:
        """What exactly is measured, in one sentence that a paper could print."""
        return str(self)

    def save_samples(self, baseline: Any, simulated: Any, directory: Path) -> None:
        """Write what a person would look at, from the `outputs` of both runs' `Metrics`. Raises `DataError`."""
        raise DataError(f"{self.name} makes no samples that could be saved")
