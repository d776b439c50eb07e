"""The loss of a model under recipes, on samples that are not those of the evaluation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core import Calibration, CalibrationWarning, Data, DataError, LoadedModel, Recipe, Run, simulate
from qsim_core.evaluation.job import Job
from qsim_core.transforms.forward import as_in_evaluation

MOST_KEPT = 2**27
"""The logits of the unquantized model that are kept, at most; of more predictions only every n-th is compared."""


class Trials:
    """Measures the loss of a model under one recipe after another, on the same samples of calibration data.

    The loss is the Kullback-Leibler divergence of the model's predictions from those of the unquantized model, in nats
    per prediction. Of a language model it estimates the rise of the logarithm of the perplexity. It varies less from
    sample to sample than that rise does, as it is zero where predictions stay the same.
    """

    def __init__(
        self, job: Job, loaded: LoadedModel, data: Data, given: Calibration, run: Run, example: Any, host: Any
    ) -> None:
        seed = run.seed if given.seed is None else given.seed
        samples = job.evaluator.training(loaded, data, given.length)
        drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[: given.samples].tolist()
        device = next(loaded.model.parameters()).device
        self._batches = [
            {key: torch.stack([samples[place][key] for place in places]).to(device) for key in samples[0]}
            for start in range(0, len(drawn), run.batch_size)
            if (places := drawn[start : start + run.batch_size])
        ]
        self._calibration = None
        if job.recipe.transforms or job.recipe.has_static:
            self._calibration = job.batches(loaded, data, given, run)
        self._structure = job.located.adapter.structure(loaded.model)
        self._model: Any = loaded.model
        self._example = example
        self._host = host
        self._run = Run(run.batch_size, seed=run.seed)
        self._every = 1
        with as_in_evaluation(self._model):
            first = self._predictions(self._batches[0]).numel()
            self._every = math.ceil(first * len(self._batches) / MOST_KEPT)
            self._unquantized = [self._predictions(batch) for batch in self._batches]
        self.samples = len(drawn)
        """The number of samples."""
        self.runs = 0
        """The recipes that were measured."""

    def loss(self, recipe: Recipe) -> float:
        """The mean loss of all predictions; NaN if it is not finite. Raises a `QsimError`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            simulation = simulate(
                self._model,
                recipe,
                example=self._example,
                calibration=self._calibration,
                structure=self._structure,
                run=self._run,
                host=self._host,
            )
        with simulation, as_in_evaluation(self._model):
            pairs = zip(self._batches, self._unquantized, strict=True)
            total = sum(float(_divergence(self._predictions(batch), before)) for batch, before in pairs)
        self.runs += 1
        return total / sum(map(len, self._unquantized)) if math.isfinite(total) else math.nan

    def _predictions(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The logarithms of the model's probabilities, `[predictions, classes]`, where the batch has labels."""
        logits = getattr(self._model(**batch), "logits", None)
        if logits is None:
            raise DataError(f"{type(self._model).__name__} returns no logits, which a search compares")
        labels = batch.get("labels")
        if labels is not None and labels.shape == logits.shape[:-1]:
            logits = logits[labels >= 0]
        return F.log_softmax(logits.flatten(0, -2)[:: self._every].float(), -1)


def _divergence(after: Tensor, before: Tensor) -> Tensor:
    """The divergence of predictions from those of before, added up, in float64."""
    return F.kl_div(after, before, reduction="none", log_target=True).sum(dtype=torch.float64)
