"""The weights of a model that are multiplied as one matrix, with some rows of their inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, layout_of
from qsim_core.sites.quantized_weights import READ
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context
from qsim_core.transforms.offload import editing


@dataclass
class Matrix:
    """A weight that is multiplied as one matrix [N, K], and inputs of it."""

    name: str
    site: Site
    layout: Layout
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def x(self) -> Tensor:
        """Rows of inputs [T, K], in float32 at least."""
        return torch.cat(self.inputs)

    def change(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """Give the weight the rows that `change` makes of its rows, in float64."""
        with editing(model, self.name) as parameters:
            parameter = parameters[self.name]
            parameter.copy_(self.layout.back(change(self.layout.rows(parameter.double()))))

    def map_input(self, change: Callable[[Tensor], Tensor]) -> None:
        """Map the input in each forward, after what maps it already."""
        before = self.site.rotations.get("input")
        self.site.rotations["input"] = change if before is None else After(before, change)


@dataclass(frozen=True, eq=False)
class After:
    """One map of inputs after another."""

    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def __str__(self) -> str:
        return f"{self.first}, then {self.second}"


def matrices(context: Context, rows: int, why_not: Callable[[Site, int], str | None]) -> list[Matrix]:
    """Find the weights that are multiplied as one matrix, with at most so many rows of each one's inputs.

    The rows are spread evenly over the calibration batches and in each of them. `why_not` gives a reason to leave out a
    site whose rows have a length; such weights are reported.
    """
    found: dict[str, Matrix] = {}
    refused: dict[str, str] = {}
    share = -(-rows // len(context.batches))
    kept: dict[str, int] = defaultdict(int)

    def watch(site: Site, call: Call) -> None:
        name = site.weight
        if name is None or name in refused or not (site.plan.weight or site.plan.input):
            return
        if name not in found:
            reason, layout = _one_matrix(site, call, context)
            reason = reason or why_not(site, call.input.shape[-1])
            if reason is not None or layout is None:
                refused[name] = reason or "it is used in parts"
                return
            found[name] = Matrix(name, site, layout)
        x = call.input.reshape(-1, call.input.shape[-1])
        kept[name] += len(x)
        step = max(1, -(-len(x) // share))
        found[name].inputs.append(x[::step].to(torch.promote_types(x.dtype, torch.float32), copy=True))

    context.observe(watch, context.name)
    for name, reason in refused.items():
        context.report(name, note=f"left alone: {reason}")
    for name, matrix in found.items():
        if 0 < kept[name] < (length := matrix.inputs[0].shape[-1]):
            context.warn(name, f"saw {kept[name]} tokens, fewer than its {length} columns: give more samples")
    return [matrix for name, matrix in found.items() if kept[name]]


def _one_matrix(site: Site, call: Call, context: Context) -> tuple[str | None, Layout | None]:
    """The reason why a call does not multiply by one matrix as a whole, and the layout of the parameter."""
    weights, name = context.sites.weights, site.weight or ""
    uses = weights.uses.get(name, ())
    if site.op.startswith("conv") or site.op == "einsum":
        return f"a {site.op}", None
    if name in weights.tied or len(uses) > 1 or READ in uses:
        return "it has another use, which would change with it", None
    if site.computed or name not in weights.names:
        return "it is computed in each forward", None
    if site.beside is not None:
        return "an earlier transform has split it", None
    operand, parameter = call.operands[-1], context.model.get_parameter(name)
    if call.weight != 1 or parameter.dim() != 2 or operand.numel() != parameter.numel():
        return "it is not multiplied as one matrix", None
    return None, layout_of(parameter, operand, call.layouts[1])
