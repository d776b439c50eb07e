"""Operations between products as a device computes them: softmax by tables, norms by Newton's method."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.errors import RecipeError, natural_order
from qsim_core.operations.functions import OperationCall


class Operation(Component):
    """Computes operations between products in another way. An author writes one method: `compute`.

    The gradient is that of torch's own operation.
    """

    kind: ClassVar[str] = "operation"
    hook: ClassVar[str] = "qsim_operations"
    computes: ClassVar[frozenset[str]] = frozenset()
    """The kinds of operations that it computes; empty: any."""

    @abstractmethod
    def compute(self, call: OperationCall) -> Tensor:
        """Compute an operation on its operands, which stay as they are; the result has the shape of torch's."""

    def check(self, call: OperationCall) -> None:
        """Raise `RecipeError` if it does not compute this kind of operation."""
        if self.computes and not self.computes.intersection(call.kinds):
            raise RecipeError(f"{self} computes {', '.join(sorted(self.computes, key=natural_order))}")
