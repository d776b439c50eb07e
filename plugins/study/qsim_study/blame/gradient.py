"""The prediction: one gradient pass half-way between the model as it is and the model under the recipe.

An operand x of a site is x + dx under the recipe. The pass multiplies x + dx / 2 at every site. The gradient
g = dL/dx there, of this site alone, is that of the middle, and by the midpoint rule, up to third-order terms,

    L(recipe) - L(as it is) = sum over the operands of all sites of g . dx.

A product is linear in each operand. So the g . dx of its two operands add up to dL/dy . dy of its result y, where dy
holds the product of both errors too. This sum and its parts need no product beyond those of a backward pass. A result
that is rounded, and a sum in a simulated arithmetic, count by the same rule with the error of the result.

The predicted cost of a site is its first- and second-order terms, and half of its interactions with the other sites.
Costs add up over sites and over the parts of an error. The Fisher term 1/2 sum (dL/dy . dy)^2 over rows (a token, a
position, a token of one head) is the divergence of the outputs that the site causes alone. It has little noise, and
leaves out that labels may differ from what the model expects. Its rows need a product, so few samples have to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core import DataError, Run, Simulation
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_study.blame.halfway import HalfwayPass, Sums

Sample = Mapping[str, Tensor]
IGNORED = -100
"""The label of a position that has no part in the loss."""
FEW = 4
"""Samples of which parts and rows are looked at, at least; of many samples an eighth."""


@dataclass(frozen=True)
class Prediction:
    """The predicted change of the loss, which is a mean over labels."""

    sums: dict[str, Sums]
    labels: int
    few: int
    """The labels of the few samples of which parts and rows were looked at."""

    def parts(self, site: str) -> dict[str, float]:
        """The predicted cost of a site by part."""
        return {part: value / self.labels for part, value in self.sums[site].parts().items()}

    def noise(self, site: str) -> float:
        """The standard error of the predicted cost, with rows as independent samples."""
        return math.sqrt(self.sums[site].squares / self.few / self.labels)

    def fisher(self, site: str) -> float:
        """The Fisher term of a site."""
        return self.sums[site].squares / 2 / self.few


def predict(simulation: Simulation, samples: Sequence[Sample], run: Run) -> Prediction:
    """Predict what each site of a simulation costs, on training samples. Raises `DataError` without a loss."""
    model, halfway, labels = simulation.model, HalfwayPass(simulation), {True: 0, False: 0}
    chosen = spread(range(len(samples)), max(FEW, len(samples) // 8))
    batches = [
        (few, batch)
        for few in (True, False)
        for batch in _batches([samples[place] for place in range(len(samples)) if (place in chosen) is few], run)
    ]
    with as_in_evaluation(model), torch.enable_grad(), _frozen(model), simulation.unquantized(halfway):
        for few, batch in run.track(batches, len(batches), "gradients"):
            halfway.few, halfway.labels = few, _labels(batch)
            labels[few] += halfway.labels
            _loss(model, batch).backward()
            halfway.last = None
    return Prediction(dict(halfway.sums), sum(labels.values()), labels[True])


def spread(samples: Sequence[Any], many: int, limit: int | None = None) -> list[Any]:
    """So many of the first `limit` samples, from the first one on at equal distances; all, if there are fewer."""
    among = len(samples) if limit is None else min(limit, len(samples))
    many = min(many, among)
    return [samples[place * among // many] for place in range(many)]


def _batches(samples: Sequence[Sample], run: Run) -> Iterator[Sample]:
    """Put neighbours that have the same shapes into batches."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == run.batch_size or _shapes(batch[0]) != _shapes(sample)):
            yield {name: torch.stack([one[name] for one in batch]) for name in batch[0]}
            batch = []
        batch.append(sample)
    if batch:
        yield {name: torch.stack([one[name] for one in batch]) for name in batch[0]}


def _shapes(sample: Sample) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in sample.items()}


def _labels(batch: Sample) -> int:
    """Count the labels of a batch; a batch without labels has one for each sample."""
    labels = batch.get("labels")
    return len(next(iter(batch.values()))) if labels is None else max(1, int((labels != IGNORED).sum()))


def _loss(model: nn.Module, batch: Sample) -> Tensor:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    outputs: Any = call(model, {name: value.to(device) for name, value in batch.items()})
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise DataError(f"the model gives a {type(outputs).__name__} without a loss; blame needs one for its gradient")
    if not loss.requires_grad:
        raise DataError("the loss depends on no site that the recipe quantizes")
    if not loss.isfinite():
        raise DataError(f"half-way to the recipe the loss is {float(loss)}; blame needs a finite one")
    return loss


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of the parameters inside: the gradients of the results need none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
