"""Calls of a matmul whose product a simulated arithmetic computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core.errors import RecipeError
from qsim_core.formats.quantizer import Function, straight_through
from qsim_core.formats.random_bits import at
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.convolution import Convolution
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.arithmetic import Arithmetic, QuantizedRows
from qsim_core.sites.operand import Operand
from qsim_core.sites.site import Site

PLAIN = frozenset({"linear", "matmul", "rmatmul", "linalg_matmul", "mm", "bmm", "addmm", "baddbmm"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d"})


class Product:
    """One product at its site, with what is known of its weight."""

    site: Site
    arithmetic: Arithmetic
    operands: Sequence[Operand]
    """The operands before they were quantized, with their quantizers."""

    def weight_scales(self) -> Scales | None:
        """Give the scales of a weight whose original values are gone; None: they are there."""
        return None

    def weight_rows(self, operand: Operand, values: Tensor) -> QuantizedRows | None:
        """Give the rows of a quantized weight that earlier calls had too; None: there are none."""
        return None

    @property
    def examine(self) -> Callable[[QuantizedRows, QuantizedRows, Tensor], None] | None:
        """A function that is shown the operands and the result; None: there is none."""
        return None


@dataclass(frozen=True)
class SimulatedCall(Call):
    """A call of a matmul whose product an arithmetic computes. The gradient is that of the float32 product."""

    of: Product = None  # type: ignore[assignment]

    @classmethod
    def at_site(cls, call: Call, product: Product) -> SimulatedCall:
        """Turn a call into one that the arithmetic computes. Raises `RecipeError` if it cannot."""
        check_arithmetic(product.arithmetic, product.site, call, product.operands)
        return cls(**vars(call), of=product)

    def run(self, operands: Sequence[Tensor]) -> Any:
        """Compute the product of these operands, and add the call's bias or addend."""
        left, right = operands
        if self.operation in CONVOLUTIONS:
            return self._with_gradient(super().run, operands, self._convolved(right))
        product = self.with_beside(self.multiply(left, right))
        if self.addend is not None:
            alpha, beta = self.kwargs.get("alpha", 1), self.kwargs.get("beta", 1)
            product = alpha * product if beta == 0 else beta * self.addend + alpha * product
        bias = self.bias if self.operation == "linear" else None
        product = product if bias is None else product + bias
        return product if self.kwargs.get("out") is None else self.kwargs["out"].copy_(product)

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """Compute the product alone, without a bias or an addend."""
        with torch.no_grad():
            rows = [self._rows(place, tensor) for place, tensor in enumerate((left, right))]
            value = self._product(*rows)
            value = value.squeeze(-1) if right.dim() == 1 else value
            value = value.squeeze(-2 if right.dim() > 1 else -1) if left.dim() == 1 else value
        exact = F.linear if self.operation == "linear" else torch.matmul
        return self._with_gradient(lambda both: exact(*both), (left, right), value)

    def _rows(self, place: int, values: Tensor) -> QuantizedRows:
        operand = self.of.operands[place]

        def scales() -> Scales | None:
            if operand.quantizer is None:
                return None
            if operand.role == "weight" and (kept := self.of.weight_scales()) is not None:
                return kept
            found: Scales | None = operand.quantizer.scales(torch.atleast_2d(operand.rows.detach()))
            return found

        kept = None if operand.weight is None else self.of.weight_rows(operand, values)
        return kept or QuantizedRows(torch.atleast_2d(self.layouts[place].rows(values)), operand.quantizer, scales)

    def _product(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        """Multiply rows `[..., M, K]` and `[..., N, K]` to `[..., M, N]`; a sum of nothing is zero."""
        if not left.values.numel() or not right.values.numel():
            return left.values @ right.values.transpose(-1, -2)
        with at(f"{self.of.site.name}:product", self.of.site.calls):
            product = self.of.arithmetic.multiply(left, right)
        if (examine := self.of.examine) is not None:
            examine(left, right, product)
        return product

    def _with_gradient(self, exact: Any, operands: Sequence[Tensor], value: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)):
            return value
        product: Tensor = exact(operands)
        return straight_through(product, Function(call=torch.clone), value)

    @torch.no_grad()
    def _convolved(self, weight: Tensor) -> Tensor:
        """Compute a convolution as a product of patches, as a device does.

        A vector along K holds several taps, so the patches are quantized, and not the image.
        """
        image, kernel = self.operands[0], weight
        space = kernel.dim() - 2
        batched = image.dim() == kernel.dim()
        image = image if batched else image.unsqueeze(0)
        over = Convolution.of(self)
        taps, stride, dilation, groups = over.taps, over.stride, over.dilation, over.groups
        image = F.pad(image, [pad for side in reversed(over.sides) for pad in side])
        if space == 1:  # treat it as an image with one row
            image, taps, stride, dilation = image.unsqueeze(2), (1, *taps), (1, *stride), (1, *dilation)
        patches = F.unfold(image, taps, dilation=dilation, stride=stride)
        grouped = patches.unflatten(1, (groups, -1, taps[0] * taps[1])).permute(0, 1, 4, 3, 2).flatten(3)
        quantizer = self.of.operands[0].quantizer
        with at(f"{self.of.site.name}:input", self.of.site.calls):
            rows = grouped if quantizer is None else quantizer(grouped)
        left = QuantizedRows(rows, quantizer, lambda: None if quantizer is None else quantizer.scales(grouped))
        product = self._product(left, self._rows(1, kernel))
        found = product.transpose(2, 3).flatten(1, 2).unflatten(2, over.shape)
        bias = self.bias
        found = found if bias is None else found + bias.view(-1, *(1,) * space)
        result: Tensor = found if batched else found.squeeze(0)
        return result


def check_arithmetic(arithmetic: Arithmetic, site: Site, call: Call, operands: Sequence[Operand]) -> None:
    """Raise `RecipeError` unless an arithmetic can compute a call at this site under these quantizers."""
    if call.operation not in PLAIN | CONVOLUTIONS or len(operands) != 2:
        raise RecipeError(
            f"{site.name}: {arithmetic} multiplies matrices, and this is {call.operation}; leave it alone with skip, "
            f"or name another arithmetic for it in overrides"
        )
    if site.is_value_product and site.plan.value_axis == "head":
        raise RecipeError(f"{site.name}: {arithmetic} adds along tokens, and v has its scales along the head")
    try:
        arithmetic.check([operand.quantizer for operand in operands])
    except RecipeError as error:
        stand = " and ".join(str(o.quantizer) if o.quantizer is not None else "no quantizer" for o in operands)
        raise RecipeError(f"{site.name}: {arithmetic} cannot multiply {stand}: {error}") from None
