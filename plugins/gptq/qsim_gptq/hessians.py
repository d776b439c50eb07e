"""Hessians of weights: X^T X over all input rows X of a matrix, summed while the model runs on calibration data.

Beside the original model, the rows X + D of its inputs are known too; D^T X and D^T D are then summed up as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qsim_core.formats.rounding import working
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, holds_experts
from qsim_core.sites.site import Site
from qsim_core.snapshots import sample
from qsim_core.transforms.context import MatmulWeight
from qsim_gptq.inputs import Unseen, matrices, samples


class Moments(NamedTuple):
    """Sums over the input rows x of one matrix, and over what the original model's rows are more, d: [K, K] each."""

    hessian: Tensor
    """Of x^T x."""
    drift: Tensor | None = None
    """Of d^T x; None: the original rows are not known, and count as the same."""
    spread: Tensor | None = None
    """Of d^T d."""

    def add(self, more: Moments) -> None:
        """Add sums over other rows."""
        for mine, other in zip(self, more, strict=True):
            if mine is not None and other is not None:
                mine += other


@dataclass
class Part:
    """The part of a parameter that one matmul used: the whole parameter, or one expert's matrix."""

    operand: Tensor
    layout: Layout
    moments: list[Moments] | None
    """The sums of each matrix in the part; None: no call used the part."""
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
        found = [None] * len(self.tokens) if self.moments is None else [[one] for one in self.moments]
        return [
            Part(operand, self.layout, moments, [tokens])
            for operand, moments, tokens in zip(self.operand, found, self.tokens, strict=True)
        ]


@dataclass
class Gathered:
    """The parts of one weight that calls have used so far."""

    parts: dict[tuple[object, ...], Part] = field(default_factory=dict)
    reason: str = ""
    """The reason why the input rows of the weight are unknown; empty if they are known."""
    unpaired: bool = False
    """True if a call had other rows than the original model: an expert that got other tokens."""

    def complete(self, parameter: Tensor) -> list[Part]:
        """Return the parts that make up the parameter, with experts that no call used. Raises `Unseen`."""
        if self.reason:
            raise Unseen(self.reason)
        parts = list(self.parts.values())
        if self.unpaired:
            for part in parts:
                part.moments = part.moments and [Moments(one.hessian) for one in part.moments]
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
    """Observes matmuls and sums up the moments of the inputs of some weights.

    With `leader`, only calls count whose input is the same tensor object as the leader's input. With `paired` it is
    shown each call beside that of the original model. `quantized` gives a call with quantized inputs.
    """

    def __init__(
        self,
        weights: Iterable[MatmulWeight],
        leader: MatmulWeight | None = None,
        paired: bool = False,
        quantized: Callable[[Site, Call], Call] | None = None,
    ) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self.found = {name: Gathered() for name in self.weights}
        self.leader = leader
        self.paired = paired
        self.quantized = quantized
        self._led: Tensor | None = None
        self._rounded: Tensor | None = None
        self._last: _Last | None = None

    def __call__(self, site: Site, call: Call, original: Call | None = None) -> None:
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
        if self.quantized is not None:
            call = self._sharing(self.quantized(site, call))
        try:
            self._add(gathered, call, original, place)
        except Unseen as error:
            gathered.reason = str(error)

    def _sharing(self, call: Call) -> Call:
        """Put the last quantized input in the place of an equal one, so that its products are known."""
        operands = list(call.operands)
        for place, x in enumerate(operands):
            if place != call.weight:
                last = self._rounded
                if last is not None and last.shape == x.shape and torch.equal(last, x):
                    operands[place] = last
                self._rounded = operands[place]
        return replace(call, operands=tuple(operands))

    def _add(self, gathered: Gathered, call: Call, original: Call | None, place: int) -> None:
        operand = call.operands[place].detach()
        key = (operand.storage_offset(), tuple(operand.shape), operand.stride())
        part = gathered.parts.get(key)
        count, width = matrices(call, place), call.layouts[place].rows(operand).shape[-1]
        if part is None:
            part = Part(operand, call.layouts[place], None, [0] * count)
        if part.moments is None:
            zeros = [working(operand).new_zeros(width, width) for _ in range(count * (3 if self.paired else 1))]
            part.moments = [Moments(*zeros[index::count]) for index in range(count)]
        before = iter(()) if original is None else samples(original, place)
        for portion in samples(call, place):
            others = next(before, [None] * count)
            for index, (x, other) in enumerate(zip(portion, others, strict=True)):
                if self.paired and (other is None or other.shape != x.shape):
                    gathered.unpaired, other = True, None
                sums, tokens = self._sums(x, other, part.moments[index].hessian.dtype)
                part.moments[index].add(sums)
                part.tokens[index] += tokens
        gathered.parts[key] = part

    def _sums(self, x: Tensor, other: Tensor | None, dtype: torch.dtype) -> tuple[Moments, int]:
        """The sums over rows, and the number of rows that are not all 0; the last are reused for k and v after q."""
        seen, last = (_mark(x), None if other is None else _mark(other), dtype), self._last
        if last is None or last.seen != seen or not torch.equal(last.values, sample(x)) or x.numel() == 0:
            wide = x.to(dtype)
            found = Moments(wide.T @ wide)
            if other is not None:
                drift = other.to(dtype) - wide
                found = Moments(found.hessian, drift.T @ wide, drift.T @ drift)
            last = _Last(seen, (x, other), sample(x).clone(), found, int(wide.any(-1).sum()))
            self._last = last
        return last.sums, last.tokens


class _Last(NamedTuple):
    """The rows that were summed up last, and their sums."""

    seen: tuple[object, ...]
    rows: tuple[Tensor, Tensor | None]
    """The rows are kept, so that no other tensor gets their address."""
    values: Tensor
    sums: Moments
    tokens: int


def _mark(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, -1 if x.is_inference() else x._version
