"""Products that no float matmul computes: both operands' quantizers name what multiplies them instead.

What a device does to partial products, between the operands and the result, no quantizer of either can say. A
quantizer that has a `multiplier` is for both operands, and the multiplier gets them quantized, as rows along the
reduction axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core.errors import RecipeError
from qsim_core.formats.quantizer import Function, Multiplier, Quantizer, straight_through
from qsim_core.formats.random_bits import at
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.convolution import Convolution
from qsim_core.sites.site import Site

PLAIN = frozenset({"linear", "matmul", "rmatmul", "linalg_matmul", "mm", "bmm", "addmm", "baddbmm"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d"})


@dataclass(frozen=True)
class Multiplied(Call):
    """A call of a matmul that a multiplier computes. Its gradient is the float product's."""

    multiplier: Multiplier = None  # type: ignore[assignment]
    quantizers: tuple[Quantizer, ...] = ()
    site: str = ""
    step: int = 0
    """What random numbers depend on, the multiplier's own seed aside."""

    def run(self, operands: Sequence[Tensor]) -> Any:
        """The product, and what the call adds to it."""
        left, right = operands
        if self.operation in CONVOLUTIONS:
            return self._passing(super().run, operands, self._convolved(right))
        product = self.multiply(left, right)
        if self.addend is not None:
            alpha, beta = self.kwargs.get("alpha", 1), self.kwargs.get("beta", 1)
            product = alpha * product if beta == 0 else beta * self.addend + alpha * product
        bias = self.bias if self.operation == "linear" else None
        product = product if bias is None else product + bias
        return product if self.kwargs.get("out") is None else self.kwargs["out"].copy_(product)

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        with torch.no_grad():
            rows, columns = (layout.rows(operand) for layout, operand in zip(self.layouts, (left, right), strict=True))
            value = self._product(torch.atleast_2d(rows), torch.atleast_2d(columns))
            value = value.squeeze(-1) if right.dim() == 1 else value
            value = value.squeeze(-2 if right.dim() > 1 else -1) if left.dim() == 1 else value
        exact = F.linear if self.operation == "linear" else torch.matmul
        return self._passing(lambda both: exact(*both), (left, right), value)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Rows `[..., M, K]` and `[..., N, K]` to `[..., M, N]`."""
        with at(f"{self.site}:product", self.step):
            product: Tensor = self.multiplier(left, right, self.quantizers)
        return product

    def _passing(self, exact: Any, operands: Sequence[Tensor], value: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)):
            return value
        product: Tensor = exact(operands)
        return straight_through(product, Function(call=torch.clone), value)

    @torch.no_grad()
    def _convolved(self, weight: Tensor) -> Tensor:
        """A convolution as a product of patches, which are what a device is given: their vectors along K hold several
        taps, so that they are quantized as such and not as images."""
        image, kernel = self.operands[0], weight
        space = kernel.dim() - 2
        batched = image.dim() == kernel.dim()
        image = image if batched else image.unsqueeze(0)
        over = Convolution.of(self)
        taps, stride, dilation, groups = over.taps, over.stride, over.dilation, over.groups
        image = F.pad(image, [pad for side in reversed(over.sides) for pad in side])
        if space == 1:  # as an image of one line
            image, taps, stride, dilation = image.unsqueeze(2), (1, *taps), (1, *stride), (1, *dilation)
        patches = F.unfold(image, taps, dilation=dilation, stride=stride)
        grouped = patches.unflatten(1, (groups, -1, taps[0] * taps[1])).permute(0, 1, 4, 3, 2).flatten(3)
        with at(f"{self.site}:input", self.step):
            rows = self.quantizers[0](grouped)
        product = self._product(rows, self.layouts[1].rows(kernel))
        found = product.transpose(2, 3).flatten(1, 2).unflatten(2, over.shape)
        bias = self.bias
        found = found if bias is None else found + bias.view(-1, *(1,) * space)
        result: Tensor = found if batched else found.squeeze(0)
        return result


def multiplied(site: Site, call: Call, roles: Sequence[str], value_axis: str, quantizing: bool) -> Call:
    """The call, computed by the multiplier that the quantizers of its operands name; as it is if they name none.

    Raises `RecipeError` where one operand's quantizer names another multiplier than the other's, or none, and for what
    is no product of two matrices: as soon as a weight is met, while nothing is quantized yet.
    """
    if not quantizing and site.weight is None:  # an alias that it has no softmax for yet may change its plan
        return call
    quantizers: list[Any] = [site.quantizer(role) if quantizing else site.planned(role) for role in roles]
    multipliers = [getattr(quantizer, "multiplier", None) for quantizer in quantizers]
    multiplier = next((found for found in multipliers if found is not None), None)
    if multiplier is None:
        return call
    if any(other != multiplier for other in multipliers):
        stand = " and ".join(str(quantizer) if quantizer else "no quantizer" for quantizer in quantizers)
        raise RecipeError(
            f"{site.name}: {multiplier} multiplies two operands that are quantized for it, and here stand {stand}"
        )
    if call.operation not in PLAIN | CONVOLUTIONS or len(quantizers) != 2:
        raise RecipeError(
            f"{site.name}: {multiplier} multiplies matrices, and this is {call.operation}; leave it alone with skip, "
            f"or name other quantizers for it in overrides"
        )
    if site.is_value_product and value_axis == "head":
        raise RecipeError(f"{site.name}: {multiplier} adds along tokens, and v has its scales along the head")
    if not quantizing:
        return call
    own = {field.name: getattr(call, field.name) for field in fields(Call)}
    return Multiplied(**own, multiplier=multiplier, quantizers=tuple(quantizers), site=site.name, step=site.calls)
