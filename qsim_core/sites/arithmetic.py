"""Arithmetics: how a product is multiplied and added up.

An arithmetic of a device computes a product in its own way: one method, `multiply`. An exact one gives the numbers of
the reference and saves time: it plans how a call's operands are lowered, and declines what it does not compute exactly.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.errors import RecipeError
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.workspace import Memory


@dataclass(frozen=True)
class QuantizedRows:
    """One operand of a product as an arithmetic is given it: quantized rows, the reduction axis last."""

    values: Tensor
    """[..., R, K], quantized."""
    quantizer: Any
    """The quantizer of the rows; None: they are not quantized."""
    find_scales: Callable[[], Scales | None]

    @functools.cached_property
    def scales(self) -> Scales | None:
        """The scales and zero points of the rows, [R or 1, B or 1] over all leading axes; None: there are none."""
        return self.find_scales()

    @property
    def element(self) -> Any:
        """The number format of the scaled values. Raises `RecipeError` without a quantizer that has one."""
        plain = getattr(self.quantizer, "plain", None)
        element = getattr(plain, "element", None) or getattr(plain, "unscaled", None)
        if element is None:
            raise RecipeError(f"{self.quantizer or 'no quantizer'} has no element format")
        return element

    @functools.cached_property
    def scale(self) -> Tensor:
        """The scale of each value, [..., R, K] or to broadcast to it; 1 where there are none."""
        found = self.scales
        if found is None:
            return torch.ones((), dtype=self.values.dtype, device=self.values.device)
        rows, length = self.values.shape[:-1], self.values.shape[-1]
        blocks = found.scale.shape[-1]
        if blocks > 1:
            wide = found.scale.repeat_interleave(self.block, -1)[:, :length]
        else:
            wide = found.scale
        return wide.view(*rows, -1) if len(wide) > 1 or not rows else wide

    @property
    def block(self) -> int:
        """The number of columns that share a scale; K where all of a row does."""
        granularity = getattr(self.quantizer, "granularity", None)
        length = self.values.shape[-1]
        return min(granularity, length) if isinstance(granularity, int) else length

    @functools.cached_property
    def units(self) -> Tensor:
        """The values in units of their scales, [..., R, K]: the element format's own values, whole for integers."""
        scale = self.scale
        exact = self.values / torch.where(scale == 0, 1.0, scale)
        return exact.round() if self.element.is_integer else exact


class Arithmetic(Component):
    """Multiplies and adds up a product. One method to write: `multiply`.

    The gradient is that of the float32 product.
    """

    kind: ClassVar[str] = "arithmetic"
    hook: ClassVar[str] = "qsim_arithmetics"
    simulates: ClassVar[bool] = True
    """True if `multiply` gives other numbers than a float32 product, and so has to be called."""

    @abstractmethod
    def multiply(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        """Multiply rows `[..., M, K]` and `[..., N, K]` to `[..., M, N]`, in the dtype of the left values."""

    def check(self, quantizers: Sequence[Any]) -> None:
        """Raise `RecipeError` if the operands' quantizers are not what this arithmetic computes with.

        The message says what it takes; the site is added to it.
        """

    def lower(self, call: Call, roles: Sequence[str], quantizers: Sequence[Any]) -> Lowering | None:
        """Plan an exact computation of the call; None: the product is computed in the model's own dtype.

        `roles` are those of the operands, `quantizers` those of the operands and of the result.
        """
        return None


class Float32(Arithmetic):
    """The float32 product (float64 for float64) of the model: the reference."""

    name = "float32"
    simulates = False

    def multiply(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        return left.values @ right.values.transpose(-1, -2)


class ExactArithmetic(Float32):
    """Computes some products faster, with the reference's numbers. One method to write: `lower`."""

    automatic: ClassVar[bool] = True
    """True if `auto` may choose it."""
    order: ClassVar[int] = 100
    """Its place among the arithmetics that `auto` asks: the lowest number is asked first."""

    @abstractmethod
    def lower(self, call: Call, roles: Sequence[str], quantizers: Sequence[Any]) -> Lowering | None: ...

    def worthwhile(self, call: Call) -> bool:
        """True if it is faster than float32 for such a call, on this machine; `auto` asks."""
        return True


class Lowered(Protocol):
    """An operand's rows in the form of an exact arithmetic."""

    def values(self) -> Tensor:
        """Give the rows in float32, quantized."""


class Lowering(ABC):
    """The plan of one exact product. Where it is not exact for an operand, its methods give None."""

    arithmetic: ClassVar[str]
    """The name of the arithmetic, for audits."""

    def __init__(self, quantizers: Sequence[Any]) -> None:
        self.quantizers = quantizers
        """The quantizers of the two operands."""

    @property
    def key(self) -> tuple[Any, ...]:
        """The arithmetic, and all else that distinguishes its operands from those of other plans."""
        return (self.arithmetic,)

    @property
    def rounds(self) -> bool:
        """True if the product comes rounded to the output's format."""
        return False

    def of(self, place: int) -> tuple[Any, ...]:
        """A key of all that decides what the operand at this place becomes."""
        return *self.key, self.quantizers[place]

    @abstractmethod
    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> Any:
        """Quantize an operand's rows [..., K] into this form, in this memory if there is one."""

    def new(self, rows: Tensor) -> Any:
        """Quantize a weight's rows [N, K] into this form."""
        return self.take(1, rows)

    @abstractmethod
    def again(self, rows: Tensor, kept: Any) -> Any:
        """Make this form of a weight's rows that were overwritten with their quantized values, from what `keep` kept."""

    def pinned(self, rows: Tensor, scales: Any) -> Any:
        """Make this form of a weight's rows that a transform has put on their grid, under its scales (None: unknown)."""
        return None if scales is None else self.again(rows, scales)

    def keep(self, made: Any) -> Any:
        """Give what `again` needs to know of what `new` made."""
        return made.scales

    @abstractmethod
    def product(self, call: Call, first: Any, second: Any) -> Tensor | None:
        """Compute the call's product, with its bias, in float32."""

    in_parts: ClassVar[bool] = False
    """True if `part` multiplies some rows of the operands at a time, as attention by tiles does."""

    def part(self, layouts: Sequence[Layout], first: Any, second: Any, memory: Memory) -> Tensor:
        """Multiply some rows of both operands, in float32, in this memory."""
        raise NotImplementedError


class Auto(Float32):
    """Each product in the fastest way that gives the reference's numbers: an exact arithmetic, or float32."""

    name = "auto"


FLOAT32, AUTO = Float32(), Auto()


def lowering_of(
    arithmetic: Arithmetic,
    exact: Sequence[ExactArithmetic],
    call: Call,
    roles: Sequence[str],
    quantizers: Sequence[Any],
) -> Lowering | None:
    """Plan a call under an arithmetic; `auto` takes the first of the `exact` ones that does not decline."""
    if type(arithmetic) is not Auto:
        return arithmetic.lower(call, roles, quantizers)
    for candidate in exact:
        lowering = candidate.lower(call, roles, quantizers) if candidate.worthwhile(call) else None
        if lowering is not None:
            return lowering
    return None
