"""Products of activations that are computed some rows at a time, for attention by tiles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout
from qsim_core.sites.arithmetic import ExactArithmetic, Lowering, lowering_of
from qsim_core.sites.executor import Execution
from qsim_core.sites.operand import Operand
from qsim_core.sites.site import Site
from qsim_core.sites.workspace import Memory, Workspace, like


class PartialLowering(Lowering):
    """The plan of an exact product that can multiply some rows of the operands at a time."""

    @abstractmethod
    def part(self, layouts: Sequence[Layout], first: Any, second: Any, memory: Memory) -> Tensor:
        """Multiply some rows of both operands; the product is float32 and lies in `memory`."""


class PartialExecution(Execution):
    """A product of activations at its site that is computed some rows at a time, for attention by tiles."""

    def __init__(
        self,
        site: Site,
        call: Call,
        operands: Sequence[Operand],
        output: Any,
        exact: Sequence[ExactArithmetic],
        workspace: Workspace,
    ) -> None:
        super().__init__(site, call, operands, output)
        self.workspace = workspace
        quantizers = [*(operand.quantizer for operand in operands), output]
        lowering = lowering_of(self.arithmetic, exact, self.call, [operand.role for operand in operands], quantizers)
        self.lowering = lowering if isinstance(lowering, PartialLowering) else None

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> Any:
        """Quantize rows [..., R, K] of the operand at this place: into the lowered form, or into a tensor."""
        taken = None if self.lowering is None else self.lowering.take(place, rows, memory)
        if taken is not None:
            return taken
        quantizer = self.operands[place].quantizer
        if quantizer is None:
            return rows
        return quantizer.quantize_into(rows, None if memory is None else like(memory, rows))

    def multiply(self, left: Any, right: Any, use: str) -> Tensor:
        """Multiply results of `take`, of rows [heads, R, K] and [heads, N, K], and quantize the product [heads, R, N].

        The product lies in the workspace, in the memory for this use.
        """
        memory = Memory(self.workspace, use)
        if self.lowering is not None and not isinstance(left, Tensor) and not isinstance(right, Tensor):
            self.site.arithmetic = self.lowering.arithmetic
            product = self.lowering.part(self.call.layouts, left, right, memory)
            return product if self.lowering.rounds else self._rounded(product)
        self.site.arithmetic = "float32"
        first, second = (operand if isinstance(operand, Tensor) else operand.values() for operand in (left, right))
        second = self.call.layouts[1].back(second)
        shape = *first.shape[:-1], second.shape[-1]
        return self._rounded(torch.bmm(first, second, out=self.workspace.empty(use, shape, first.dtype)))

    def _rounded(self, product: Tensor) -> Tensor:
        rounded: Tensor = product if self.output is None else self.output.quantize_into(product, product)
        return rounded
