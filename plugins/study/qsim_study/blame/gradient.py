"""The prediction: one gradient pass half-way between the model as it is and the model under the recipe.

A site has the exact result y of its operands, and the result y + dy under the recipe. The pass adds dy / 2 at every
site. The gradient g = dL/dy is that of the middle then, and by the midpoint rule, up to third-order terms,

    L(recipe) - L(as it is) = sum over the sites of g . dy.

The predicted cost of a site is its g . dy: its own first- and second-order terms, and half of its interactions with the
other sites. Costs add up over sites and over the parts of an error. The Fisher term 1/2 sum (g . dy)^2 over rows (a
token, a position, a token of one head) is the divergence of the outputs that the site causes alone. It has little
noise, and leaves out that labels may differ from what the model expects.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core import DataError, Run, Simulation
from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_study.blame.parts import Change, KnownWeight, Step, changes, steps

Sample = Mapping[str, Tensor]
IGNORED = -100
"""The label of a position that has no part in the loss."""


@dataclass
class Sums:
    """Sums over the rows of one site, for the gradient of the loss of all labels."""

    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By part, the sum of g . dy_part."""
    squares: float = 0.0
    """The sum of (g . dy)^2."""


@dataclass(frozen=True)
class Prediction:
    """The predicted change of the loss, which is a mean over labels."""

    sums: dict[str, Sums]
    labels: int

    def parts(self, site: str) -> dict[str, float]:
        """The predicted cost of a site by part."""
        return {part: value / self.labels for part, value in self.sums[site].parts.items()}

    def noise(self, site: str) -> float:
        """The standard error of the predicted cost, with rows as independent samples."""
        return math.sqrt(self.sums[site].squares) / self.labels

    def fisher(self, site: str) -> float:
        """The Fisher term of a site."""
        return self.sums[site].squares / 2 / self.labels


class Gradients:
    """Watches a forward: adds half of each site's error, and weighs the error with the gradient once there is one."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.sums: dict[str, Sums] = defaultdict(Sums)
        self.labels = 0
        """The labels of the batch, of which the loss is the mean."""
        self._weights: dict[tuple[str, str], dict[Any, Tensor]] = defaultdict(dict)
        """By site and part, the quantized parameters, which every batch multiplies."""

    def __call__(self, site: Site, call: Call, result: Tensor) -> Tensor:
        """Give the result with half of its error, and with a gradient."""
        if not changes(site):
            return result
        parts = dict(self._errors(site, call, result.detach()))
        middle = result + sum(parts.values()) / 2
        if not middle.requires_grad:
            middle = middle.requires_grad_().clone()  # the copy may be changed in place
        middle.register_hook(lambda gradient: self._weigh(site, call, parts, gradient))
        return middle

    def _errors(self, site: Site, call: Call, exact: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parts of the error of a call, each with its name."""
        before = exact
        for step in steps(site):
            change = self._change(site, call, step)
            after = self.simulation.tried(site, call, change=change, arithmetic=step.arithmetic)
            error = after - before
            yield step.part, torch.where(after == before, 0.0, error) if call.masked else error  # Inf - Inf is NaN
            before = after

    def _change(self, site: Site, call: Call, step: Step) -> Change:
        """The change of a part, with a parameter quantized once for all batches."""
        weight = None if call.weight is None else call.operands[call.weight]
        if not isinstance(weight, nn.Parameter) or step.arithmetic.simulates:
            return step.change
        known = self._weights[site.name, step.part]
        return lambda quantizer: KnownWeight(step.change(quantizer), weight, known)

    @torch.no_grad()
    def _weigh(self, site: Site, call: Call, parts: dict[str, Tensor], gradient: Tensor) -> None:
        whole: Any = 0.0
        sums = self.sums[site.name]
        for part, error in parts.items():
            rows = torch.linalg.vecdot(call.result.rows(error), call.result.rows(gradient)).double() * self.labels
            sums.parts[part] += float(rows.sum())
            whole = whole + rows
        sums.squares += float(whole.square().sum())


def predict(simulation: Simulation, samples: Sequence[Sample], run: Run) -> Prediction:
    """Predict what each site of a simulation costs, on training samples. Raises `DataError` without a loss."""
    model, watch, labels = simulation.model, Gradients(simulation), 0
    batches = list(_batches(samples, run.batch_size))
    with as_in_evaluation(model), torch.enable_grad(), _frozen(model), simulation.unquantized(watch):
        for batch in run.track(batches, len(batches), "gradients"):
            watch.labels = _labels(batch)
            labels += watch.labels
            _loss(model, batch).backward()
    return Prediction(dict(watch.sums), labels)


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sample]:
    """Put neighbours that have the same shapes into batches."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == size or _shapes(batch[0]) != _shapes(sample)):
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
