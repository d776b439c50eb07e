"""Products half-way between the model as it is and the model under the recipe, and the sums of their errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core import Simulation
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout
from qsim_core.sites.arithmetic import FLOAT32
from qsim_core.sites.executor import Execution, shown_operands, tried_operands
from qsim_core.sites.operand import Operand
from qsim_core.sites.site import Site
from qsim_study.blame.parts import PARTS, changes, steps

Errors = dict[str, Tensor]
"""The parts of an error by name."""
ByPart = defaultdict[str, float]
UNDIVIDED = ""
"""The name of an error that is not divided into parts."""


def _by_part() -> ByPart:
    return defaultdict(float)


@dataclass
class Sums:
    """Sums over one site of errors times the gradient of the loss of all labels."""

    always: ByPart = field(default_factory=_by_part)
    """Over all samples: of parameters, and of a simulated arithmetic."""
    few: ByPart = field(default_factory=_by_part)
    """Over few samples, of tensors that each batch quantizes anew."""
    others: ByPart = field(default_factory=_by_part)
    """Over the other samples, of the same tensors, undivided."""
    squares: float = 0.0
    """The sum of (dL/dy . dy)^2 over the rows of results y of few samples."""

    def parts(self) -> dict[str, float]:
        """The sums over all samples by part; the part of the other samples is divided like that of the few ones."""
        whole = sum(map(abs, self.few.values())) or 1.0
        divided = {part: value + self.others[UNDIVIDED] * abs(value) / whole for part, value in self.few.items()}
        there = self.always.keys() | divided.keys()
        return {part: self.always.get(part, 0.0) + divided.get(part, 0.0) for part in PARTS if part in there}


@dataclass(frozen=True)
class Moved:
    """A tensor with half of its error."""

    x: Tensor
    version: int
    quantizer: Any
    middle: Tensor
    errors: Errors

    def holds(self, x: Tensor, quantizer: Any) -> bool:
        """True if the same tensor would be moved in the same way."""
        return self.x is x and self.version == x._version and self.quantizer == quantizer and not quantizer.draws


class HalfwayPass:
    """Computes the products of forwards half-way to a recipe, and sums up in the backward passes."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.sums: dict[str, Sums] = defaultdict(Sums)
        self.labels = 0
        """The labels of the batch, of which the loss is the mean."""
        self.few = False
        """True for a batch of the few samples of which parts and rows are looked at."""
        self.parameters: dict[tuple[str, str], Errors] = {}
        """The errors of parameters, which every batch multiplies, by site and layout."""
        self.last: Moved | None = None
        """The input that was quantized last: q, k and v have the same."""

    def __call__(self, site: Site, call: Call) -> Any:
        """Give the result half-way to the recipe."""
        if not changes(site):
            return call.exact()
        middle = Halfway(site, call, self).result()
        if site.plan.arithmetic.simulates:
            in_float32 = self.simulation.tried(site, call, arithmetic=FLOAT32)
            error = {"arithmetic": _less(self.simulation.tried(site, call), in_float32, call)}
            middle = self.weighed(site, _halfway(middle, error), error, always=True)
        if self.few:
            middle = _with_gradient(middle)
            half = _less(self.simulation.tried(site, call), middle.detach(), call)
            middle.register_hook(lambda gradient: self._weigh_rows(site, call.result, 2 * half, gradient))
        return middle

    def weighed(self, site: Site, middle: Tensor, errors: Errors, always: bool = False) -> Tensor:
        """Give the tensor as this site alone reads it; errors times its gradient are added to the sums of the site."""
        seen, labels, sums = middle.view_as(middle), self.labels, self.sums[site.name]
        found = sums.always if always else sums.few if self.few else sums.others

        def add(gradient: Tensor) -> None:
            for part, error in errors.items():
                found[part] += float(torch.dot(error.flatten(), gradient.detach().flatten())) * labels

        seen.register_hook(add)
        return seen

    def _weigh_rows(self, site: Site, layout: Layout, error: Tensor, gradient: Tensor) -> None:
        rows = torch.linalg.vecdot(layout.rows(error), layout.rows(gradient.detach())).double() * self.labels
        self.sums[site.name].squares += float(rows.square().sum())


class Halfway(Execution):
    """A call of operands that are half-way to the recipe; so is its result, if that is rounded."""

    def __init__(self, site: Site, call: Call, halfway: HalfwayPass) -> None:
        operands = shown_operands(site, call, halfway.simulation.sites.weights, site.quantizer)
        super().__init__(site, call, operands, site.quantizer("output"), FLOAT32)
        self.shown, self.halfway = call, halfway

    def quantized(self, operand: Operand) -> Tensor:
        if operand.quantizer is None:
            return operand.tensor
        if operand.weight is not None and isinstance(operand.tensor, nn.Parameter):
            known, place = self.halfway.parameters, (self.site.name, operand.layout.name)
            if place not in known:
                known[place] = self._errors(operand, divided=True)
            return self.halfway.weighed(self.site, _halfway(operand.tensor, known[place]), known[place], always=True)
        x, last = operand.tensor, self.halfway.last
        if last is None or not last.holds(x, operand.quantizer):
            errors = self._errors(operand, divided=self.halfway.few)
            last = Moved(x, x._version, operand.quantizer, _halfway(x, errors), errors)
            self.halfway.last = last
        return self.halfway.weighed(self.site, last.middle, last.errors)

    def rounded_output(self, rows: Tensor) -> Tensor:
        x = rows.detach()
        errors = _errors(x, self.output, lambda quantizer: quantizer.quantize(x), divided=self.halfway.few)
        return self.halfway.weighed(self.site, _halfway(rows, errors), errors)

    def _errors(self, operand: Operand, divided: bool) -> Errors:
        place = next(place for place, one in enumerate(self.operands) if one is operand)
        weights = self.halfway.simulation.sites.weights

        def quantize(quantizer: Any) -> Tensor:
            return tried_operands(self.site, self.shown, weights, [operand.role], lambda _: quantizer)[place]

        return _errors(operand.tensor.detach(), self.site.quantizer(operand.role), quantize, divided)


def _errors(x: Tensor, quantizer: Any, quantize: Callable[[Any], Tensor], divided: bool) -> Errors:
    """The error of `quantize(quantizer)`; divided, with each part the change that it makes once it is switched on."""
    found, before = {}, x
    for part, step in steps(quantizer) if divided else [(UNDIVIDED, quantizer)]:
        after = quantize(step)
        found[part], before = after - before, after
    return found


def _halfway(x: Tensor, errors: Errors) -> Tensor:
    return _with_gradient(torch.add(x, sum(errors.values()), alpha=0.5))


def _with_gradient(x: Tensor) -> Tensor:
    """The tensor with a gradient; the model may change it in place."""
    return x if x.requires_grad else x.requires_grad_().clone()


def _less(after: Tensor, before: Tensor, call: Call) -> Tensor:
    error = after - before
    return torch.where(after == before, 0.0, error) if call.masked else error  # Inf - Inf is NaN
