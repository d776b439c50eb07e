"""The operations between the products of a forward: softmax, norms, activation functions, sums, embeddings.

A plugin meets them. Each reads its operands once and writes its result once, as one kernel does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsim_core import OperationCall, Quantizer, Simulation
from qsim_core.components.discovery import added

FLOPS = {
    "softmax": 5,  # largest, difference, exp, sum, quotient
    "log_softmax": 5,
    "rms_norm": 4,  # square, sum, product with 1/sqrt, scale
    "norm": 7,  # sum, difference, square, sum, product with 1/sqrt, scale, bias
    "rotary": 3,  # two products and a sum
    "relu": 1,
    "activation": 4,
    "embedding": 0,
}
"""Operations for an element of the result, by kind or family; an exp, a root and a quotient count as one. Others: 1."""
TURNED = 2
"""The operand of a rotary embedding that is the first one turned, and is not read by itself."""


@dataclass(frozen=True)
class OperationWork:
    """One operation between products."""

    site: str
    kind: str
    flops: int
    bytes: float
    """The bytes that are read and written, as wide as the quantizers of input and output, or as the model's dtype."""


class Between:
    """Counts the operations of a forward."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.work: list[OperationWork] = []

    def __call__(self, site: Any, call: OperationCall, result: Tensor) -> None:
        """Count one operation."""
        read = list(call.operands)
        if call.operation == "rotary" and result.shape == call.input.shape:
            del read[TURNED]
        size = sum(self._bytes(x, site.plan.input) for x in read) + self._bytes(result, site.plan.output)
        if not read:  # a table, of which a row is read for each row of the result
            size += self._bytes(result, None)
        each = next((FLOPS[kind] for kind in call.kinds if kind in FLOPS), 1)
        self.work.append(OperationWork(site.name, call.operation, each * result.numel(), size))

    def _bytes(self, x: Tensor, quantizer: Quantizer | None) -> float:
        bits = None if quantizer is None or not x.numel() else quantizer.bits_per_element(x.shape)
        return x.numel() * (self.dtype.itemsize * 8 if bits is None else bits) / 8


@contextlib.contextmanager
def counted(simulation: Simulation) -> Iterator[list[OperationWork]]:
    """Count the operations of the forwards inside."""
    parameters = (x.dtype for x in simulation.model.parameters() if x.is_floating_point())
    sites, counter = simulation.sites, Between(next(parameters, torch.get_default_dtype()))
    meet = added("operation_sites", "meets operations between products")
    before, sites.operations = sites.operations, meet(simulation.recipe)
    sites.operations.watcher = counter
    try:
        yield counter.work
    finally:
        sites.operations = before
