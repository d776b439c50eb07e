"""Learn rotations: gradients of the quantized model, and steps that keep matrices orthogonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from qsim_structure.channels import tensors_in
from torch import Tensor

from qsim_core import DataError, RecipeError, Transform
from qsim_core.matmuls.call import Call
from qsim_core.sites.arithmetic import FLOAT32
from qsim_core.sites.executor import Execution, shown_operands
from qsim_core.sites.operand import Operand
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_core.transforms.offload import at_hand
from qsim_hadamard.maps import Blocks

Changes = dict[str, list[Callable[[Tensor], Tensor]]]
"""For parameters by name, the functions that give their values from the original ones, applied in turn."""


class StraightThrough(Execution):
    """A call under the quantizers of its site, with gradients."""

    def quantized(self, operand: Operand) -> Tensor:
        if operand.quantizer is None:
            return operand.tensor
        return operand.layout.back(operand.quantizer(operand.rows))

    def rounded_output(self, rows: Tensor) -> Tensor:
        rounded: Tensor = self.output(rows)
        return rounded


def learn(
    context: Context, rotations: Sequence[Blocks], changes: Changes, steps: int, lr: float
) -> tuple[float, float]:
    """Learn rotations, and leave all changes in the parameters, computed in float64 from the original values.

    Returns the mean loss over all calibration samples with the first rotations, and with those that are kept: the
    first ones if learning has not made it less.
    """
    model = context.model
    matrices = [rotation.forward for rotation in rotations]
    first = [matrix.clone() for matrix in matrices]
    with at_hand(model), originals_of(context, changes) as originals:
        put(context, originals, changes)
        before = _mean_loss(context)
        with context.run.count(steps, 0, context.name) as count:
            for step in range(steps):
                batch = context.batches[step % len(context.batches)]
                loss = _backward(context, originals, changes, batch)
                rate = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                for matrix in matrices:
                    if matrix.grad is not None:
                        matrix.copy_(cayley(matrix, matrix.grad, rate))
                    matrix.grad = None
                put(context, originals, changes)
                count(f"loss {loss:.4g}")
        after = _mean_loss(context)
        if not after < before:
            for matrix, values in zip(matrices, first, strict=True):
                matrix.copy_(values)
            context.warn(context.name, f"has learned nothing in {steps} steps: the first rotations are kept")
            after = before
        for matrix in matrices:
            matrix.requires_grad_(False)
        put(context, originals, changes)
    return before, after


def cayley(matrix: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """One step from orthogonal matrices [B, n, n] against their gradients, to orthogonal ones: Cayley's transform."""
    product = matrix.transpose(-1, -2) @ gradient
    skew = 0.5 * (product - product.transpose(-1, -2))
    longest = 1 / skew.abs().sum(-2).amax(-1).clamp(min=1e-8)
    half = 0.5 * longest.clamp(max=lr)[:, None, None] * skew
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    turned: Tensor = torch.linalg.solve(unit + half, matrix @ (unit - half), left=False)
    return turned


def distance(output: Any, exact: Any) -> Tensor:
    """The mean divergence of logits from exact ones, over tokens; of another output the relative squared error."""
    logits, target = (getattr(one, "logits", None) for one in (output, exact))
    if isinstance(logits, Tensor) and isinstance(target, Tensor):
        expected = target.float().log_softmax(-1).flatten(0, -2)
        found = logits.float().log_softmax(-1).flatten(0, -2)
        divergence: Tensor = F.kl_div(found, expected, log_target=True, reduction="batchmean")
        return divergence
    found, expected = (_first(one).float() for one in (output, exact))
    return (found - expected).square().sum() / expected.square().sum().clamp(min=1e-30)


def _first(output: Any) -> Tensor:
    """The first tensor of floats in an output. Raises `DataError` without any."""
    for tensor in tensors_in(output):
        if tensor.is_floating_point():
            return tensor
    raise DataError(f"the model's output, {type(output).__name__}, has no tensor of numbers to compare in learning")


def _backward(context: Context, originals: Mapping[str, Tensor], changes: Changes, batch: Any) -> float:
    """Add the gradients of one sample's loss to the rotations: through the inputs, and through the weights."""
    loss = _loss(context, batch, gradients=True)
    backpropagate(context, loss, originals, changes)
    return float(loss)


def backpropagate(context: Context, loss: Tensor, originals: Mapping[str, Tensor], changes: Changes) -> None:
    """Add the gradients of a loss to what is learned: through the inputs, and through the weights.

    Raises `DataError` for a loss that is NaN or Inf, and `RecipeError` for a model without gradients.
    """
    parameters = {name: context.model.get_parameter(name) for name in changes}
    if not bool(loss.isfinite()):
        raise DataError(f"{context.name}: the loss of a calibration sample is {float(loss)}")
    try:
        loss.backward()
    except RuntimeError as error:  # such as a tensor that the model changes in place
        reason = str(error).partition("\n")[0].partition(". Hint")[0]
        raise RecipeError(f"{context.name} needs gradients, and this model has none: {reason}") from None
    with torch.enable_grad():
        changed = {name: changed_values(originals[name], changes[name]) for name in changes}
    reached = [
        name for name, parameter in parameters.items() if parameter.grad is not None and changed[name].requires_grad
    ]
    torch.autograd.backward([changed[name] for name in reached], [parameters[name].grad for name in reached])
    for parameter in parameters.values():
        parameter.grad = None


def check_dynamic(transform: Transform, context: Context) -> None:
    """Raise `RecipeError` where the recipe wants static scales, which are found after all transforms."""
    for site in context.all_sites:
        for role in (*site.input_roles, "output"):
            planned = site.planned(role)
            if planned is not None and planned.needs_held_scales(role):
                raise RecipeError(
                    f"{transform} learns under dynamic scales, and {site.name} has {planned}, whose scales are found "
                    f"after all transforms; use hadamard"
                )


def _loss(context: Context, batch: Any, gradients: bool = False) -> Tensor:
    with as_in_evaluation(context.model):
        exact = call(context.model, batch)
        with torch.set_grad_enabled(gradients), quantized(context):
            return distance(call(context.model, batch), exact)


def _mean_loss(context: Context) -> float:
    return sum(float(_loss(context, batch)) for batch in context.batches) / len(context.batches)


@contextmanager
def quantized(context: Context) -> Iterator[None]:
    """Inside, the model is computed under its recipe, with gradients, in float32 arithmetic."""
    sites = context.sites

    def compute(site: Site, call: Call) -> Tensor:
        operands = shown_operands(site, call, sites.weights, site.quantizer)
        return StraightThrough(site, call, operands, site.quantizer("output"), FLOAT32).result()

    sites.compute = compute
    try:
        with sites.uncounted():
            yield
    finally:
        sites.compute = None


@contextmanager
def originals_of(context: Context, changes: Changes) -> Iterator[dict[str, Tensor]]:
    """The values of the parameters that are changed; inside, these alone take gradients."""
    model = context.model
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    for name in changes:
        model.get_parameter(name).requires_grad_(True)
    try:
        yield {name: model.get_parameter(name).detach().clone() for name in changes}
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def put(context: Context, originals: Mapping[str, Tensor], changes: Changes) -> None:
    for name, original in originals.items():
        context.model.get_parameter(name).copy_(changed_values(original.double(), changes[name]))


def changed_values(values: Tensor, functions: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    for function in functions:
        values = function(values)
    return values
