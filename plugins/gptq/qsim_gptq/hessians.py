"""Hessians of weights: X^T X over all input rows X of a matrix, summed while the model runs on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qsim_core.formats.rounding import working
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, holds_experts
from qsim_core.sites.site import Site
from qsim_core.snapshots import sample
from qsim_core.transforms.context import MatmulWeight
from qsim_gptq.inputs import Unseen, matrices, samples


@dataclass
class Part:
    """The part of a parameter that one matmul used: the whole parameter, or one expert's matrix."""

    operand: Tensor
    layout: Layout
    hessians: Tensor | None
    """The Hessian of each matrix in the part, [G, K, K]; None: no call used the part."""
    tokens: list[int]
    """The number of input rows of each matrix that are not all 0."""

    @property
    def rows(self) -> Tensor:
        """The part as rows [..., K], the form in which the quantizer takes it."""
        return self.layout.rows(self.operand)

    def experts(self) -> list[Part]:
        """The matrix of each expert as a part of its own; the part itself if it is one matrix."""
        if not holds_experts(self.operand, self.layout):
            return [self]
        found = [None] * len(self.tokens) if self.hessians is None else self.hessians.split(1)
        return [
            Part(operand, self.layout, hessian, [tokens])
            for operand, hessian, tokens in zip(self.operand, found, self.tokens, strict=True)
        ]


@dataclass
class Gathered:
    """The parts of one weight that calls have used so far."""

    parts: dict[tuple[object, ...], Part] = field(default_factory=dict)
    reason: str = ""
    """The reason why the input rows of the weight are unknown; empty if they are known."""

    def complete(self, parameter: Tensor) -> list[Part]:
        """Return the parts that make up the parameter, with experts that no call used. Raises `Unseen`."""
        if self.reason:
            raise Unseen(self.reason)
        parts = list(self.parts.values())
        if not parts:
            raise Unseen("no calibration sample reached it")
        if sum(part.operand.numel() for part in parts) == parameter.numel():
            return parts
        first, size = parts[0], parameter[0].numel()
        if parameter.dim() != 3 or any(part.operand.numel() != size for part in parts):
            raise Unseen("it is multiplied in parts")
        start, step = parameter.storage_offset(), parameter.stride(0)
        met = {(part.operand.storage_offset() - start) // step: part for part in parts}
        shape, stride = first.operand.shape, first.operand.stride()
        return [
            met.get(e, Part(parameter.detach().as_strided(shape, stride, start + e * step), first.layout, None, [0]))
            for e in range(len(parameter))
        ]


class Gatherer:
    """Observes matmuls and sums up the Hessians of some weights.

    With `leader`, only calls count whose input is the same tensor object as the leader's input.
    """

    def __init__(self, weights: Iterable[MatmulWeight], leader: MatmulWeight | None = None) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self.found = {name: Gathered() for name in self.weights}
        self.leader = leader
        self._led: Tensor | None = None
        self._last: tuple[tuple[object, ...], Tensor, Tensor, tuple[Tensor, int]] | None = None

    def __call__(self, site: Site, call: Call) -> None:
        weight = self.weights.get(site.weight or "")
        place = None if weight is None else call.weight
        if weight is None or place is None:
            return
        x = call.operands[1 - place] if len(call.operands) == 2 else None
        if self.leader is not None:
            if weight is self.leader:
                self._led = x
            elif x is not self._led:
                return
        gathered = self.found[weight.name]
        try:
            self._add(gathered, call, place)
        except Unseen as error:
            gathered.reason = str(error)

    def _add(self, gathered: Gathered, call: Call, place: int) -> None:
        operand = call.operands[place].detach()
        key = (operand.storage_offset(), tuple(operand.shape), operand.stride())
        part = gathered.parts.get(key)
        count, width = matrices(call, place), call.layouts[place].rows(operand).shape[-1]
        if part is None:
            part = Part(operand, call.layouts[place], None, [0] * count)
        if part.hessians is None:
            part.hessians = working(operand).new_zeros(count, width, width)
        for portion in samples(call, place):
            for index, x in enumerate(portion):
                product, count = self._product(x, part.hessians.dtype)
                part.hessians[index] += product
                part.tokens[index] += count
        gathered.parts[key] = part

    def _product(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Return X^T X and the number of rows that are not all 0. The last result is reused for k and v after q."""
        seen = (x.data_ptr(), x.shape, x.stride(), dtype, -1 if x.is_inference() else x._version)
        values, last = sample(x), self._last
        if last is None or last[0] != seen or not torch.equal(last[2], values) or x.numel() == 0:
            wide = x.to(dtype)
            found = wide.T @ wide, int(wide.any(-1).sum())
            last = self._last = seen, x, values.clone(), found  # x is kept, so that no other tensor gets its address
        return last[3]
