"""The base class of evaluators. An evaluator turns a model and data into metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from qsim_core.components.component import Component
from qsim_core.errors import DataError
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.data import Data
from qsim_core.evaluation.metrics import finite_outputs, unscored
from qsim_core.transforms.run import Run


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

    def measure(self, loaded: LoadedModel, data: Data, run: Run) -> dict[str, float]:
        """The metrics that `evaluate` gives; NaN if an output of the model was not finite, as it has no score then."""
        with finite_outputs(loaded.model) as finite:
            metrics = self.evaluate(loaded, data, run)
        if finite():
            return metrics
        if run.known is not None:
            run.known.clear()  # a longer run has to see what is not finite
        return unscored(metrics)

    def read(self, source: str, split: str = "test") -> Data:
        """The data of a path or name; of a data set the part `split`, unless the name says another.

        Raises `DataError`.
        """
        raise DataError(f"{self.name} cannot read data; leave --data out")

    def default_data(self) -> Data | None:
        """The data that are used when none are named, such as noise; none: the data that the model comes with."""
        return None

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Batches of one sample each for transforms and static scales, drawn by `seed`. Raises `DataError`."""
        raise DataError(f"{self.name} makes no calibration batches; use an evaluator that does, or Python")

    def training(self, loaded: LoadedModel, data: Data, length: int | None) -> Sequence[dict[str, torch.Tensor]]:
        """Training samples of `length` tokens (none: the evaluator's own length).

        Each holds the keyword arguments of a forward that gives a `loss`, without the axis of a batch. Raises
        `DataError`.
        """
        raise DataError(f"{self.name} makes no training samples; use an evaluator that does, or Python")

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any] | None:
        """One small batch, as keyword arguments of the model's forward: finds the sites, feeds the audit."""
        return None

    def protocol(self, loaded: LoadedModel) -> str:
        """The exact measurement in one sentence that a paper could print."""
        return str(self)

    def protocol_for(self, loaded: LoadedModel, data: Data) -> str:
        """The protocol for these data, if it depends on them. Raises `DataError`."""
        return self.protocol(loaded)

    def save_samples(self, baseline: Any, simulated: Any, directory: Path) -> None:
        """Write samples for a person to look at, from the `outputs` of both runs' `Metrics`. Raises `DataError`."""
        raise DataError(f"{self.name} makes no samples that could be saved")
