"""Arithmetics: the ways to multiply and add up a product.

An arithmetic of a device computes a product in that device's way: an author writes one method, `multiply`.
An exact arithmetic gives the reference's numbers in less time. It plans how a call's operands are lowered, and declines
a call that it does not compute exactly.
"""

from __future__ import annotations

import functools
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.errors import RecipeError
from qsim_core.formats.quantizer import SiteQuantizer
from qsim_core.formats.rounding import working
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.partial_sums import PartialSums, compared
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.workspace import Memory


@dataclass(frozen=True)
class QuantizedRows:
    """One operand of a product, as an arithmetic gets it: quantized rows with the reduction axis last."""

    values: Tensor
    """[..., R, K], quantized."""
    quantizer: SiteQuantizer | None
    """The quantizer of the rows; None: they are not quantized."""
    find_scales: Callable[[], Scales | None]
    """Finds the scales of the rows when an arithmetic first asks for them."""

    @classmethod
    def of(cls, quantizer: SiteQuantizer | None, rows: Tensor) -> QuantizedRows:
        """Quantize rows [..., R, K]; without a quantizer they stay as they are."""
        if quantizer is None:
            return cls(rows, None, lambda: None)
        return cls(quantizer.quantize(rows), quantizer, lambda: quantizer.scales(rows))

    @functools.cached_property
    def scales(self) -> Scales | None:
        """The scales and zero points of the rows, [R or 1, B or 1] over all leading axes; None: without."""
        return self.find_scales() if self.values.numel() else None

    @property
    def element(self) -> Any:
        """The number format of the values in units of their scales. Raises `RecipeError` without it."""
        element = None if self.quantizer is None else self.quantizer.rounds_to
        if element is None:
            raise RecipeError(f"{self.quantizer or 'no quantizer'} has no number format")
        return element

    @functools.cached_property
    def scale(self) -> Tensor:
        """The scale of each value: [..., R, K], with 1 in place of an axis along which it is the same."""
        found = self.scales
        if found is None:
            return torch.ones(1, 1, dtype=working(self.values).dtype, device=self.values.device)
        *leading, rows, length = self.values.shape
        scale, blocks = found.scale, found.scale.shape[-1]
        if len(scale) > 1:
            height = min(self._shared[0], rows)
            scale = scale.reshape(*leading, -(-rows // height), blocks)
            scale = scale.repeat_interleave(height, -2)[..., :rows, :] if height > 1 else scale
        return scale.repeat_interleave(self.block, -1)[..., :length] if blocks > 1 else scale

    @property
    def block(self) -> int:
        """The number of columns that share a scale; K where all of a row does."""
        return min(self._shared[1], self.values.shape[-1])

    @property
    def _shared(self) -> tuple[int, int]:
        """The rows and the columns that share a scale, at most."""
        granularity = None if self.quantizer is None else self.quantizer.granularity
        if isinstance(granularity, tuple):
            return granularity
        return 1, granularity if isinstance(granularity, int) else sys.maxsize

    @functools.cached_property
    def units(self) -> Tensor:
        """The values in units of their scales, [..., R, K]: the number format's own; a code less its zero point."""
        element, scale = self.element, self.scale
        exact = working(self.values) / torch.where(scale == 0, 1.0, scale)
        rounded: Tensor = exact.round_() if element.is_integer else element.replace(rounding="even").quantize(exact)
        return rounded

    def blocks_with(self, other: QuantizedRows) -> Iterator[tuple[Block, Block]]:
        """Go along the reduction axis in blocks of columns that share a scale in both operands."""
        length = self.values.shape[-1]
        starts = {start for rows in (self, other) for start in range(0, length, max(rows.block, 1))}
        for first, last in itertools.pairwise([*sorted(starts), length]):
            yield self._columns(first, last), other._columns(first, last)

    def _columns(self, first: int, last: int) -> Block:
        scale = self.scale if self.scale.shape[-1] == 1 else self.scale[..., first : first + 1]
        return Block(self.units[..., first:last], scale)


class Block(NamedTuple):
    """Some columns of an operand's rows that share a scale."""

    units: Tensor
    """The values in units of their scales, [..., R, n]."""
    scale: Tensor
    """The scale of each row, [..., R or 1, 1]."""


class NarrowSums(NamedTuple):
    """The sums of codes that share scales, in two's complement."""

    bits: int
    wraps: bool
    """True if sums wrap around; False if something else happens to sums, partial ones too, outside the range."""


class Arithmetic(Component):
    """Multiplies and adds up a product. An author writes one method: `multiply`.

    The gradient is that of the float32 product.
    """

    kind: ClassVar[str] = "arithmetic"
    hook: ClassVar[str] = "qsim_arithmetics"
    simulates: ClassVar[bool] = True
    """True if `multiply` gives other numbers than a float32 product. Then every product is computed by it."""

    @property
    def accumulator_bits(self) -> int:
        """The width of the sum in bits, by which hardware is priced."""
        return 32

    @property
    def narrow_sums(self) -> NarrowSums | None:
        """The sums of codes, if their width is all that sets the product apart from `float32`.

        An exact arithmetic may then compute it; None: only `multiply` can.
        """
        return None

    @abstractmethod
    def multiply(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        """Multiply rows `[..., M, K]` and `[..., N, K]` to `[..., M, N]`, in the dtype of the left values."""

    def partial_sums(self, left: QuantizedRows, right: QuantizedRows, product: Tensor) -> PartialSums:
        """Tell an audit what the sums of a product did: its outputs are compared with the exact sums of the values."""
        return compared(left.values, right.values, product)

    def check(self, quantizers: Sequence[Any]) -> None:
        """Raise `RecipeError` if this arithmetic cannot multiply operands with these quantizers.

        The message says which quantizers it takes. The site's name is added by the caller.
        """

    def lower(self, call: Call, roles: Sequence[str], quantizers: Sequence[Any]) -> Lowering | None:
        """Plan an exact computation of the call; None declines, and the product is computed in the model's own dtype.

        `roles` are the roles of the operands. `quantizers` are those of the operands, and then that of the result.
        """
        return None


class Accumulator(Arithmetic):
    """Adds up codes, whose scales are multiplied afterwards. One method to write: `add_up`.

    A product is the sum over the blocks that share scales s and t in both operands: add_up(x / s, w / t) s t, with s, t
    and their sum in float32. Under a scale for each row or for the tensor, all of a row is one block.
    """

    integers: ClassVar[bool] = False
    """True if it adds up integers only."""

    @abstractmethod
    def add_up(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply and add up codes `[..., M, n]` and `[..., N, n]`, values of their number formats: `[..., M, N]`."""

    def multiply(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        parts = (
            self.add_up(first.units, second.units) * first.scale * second.scale.transpose(-1, -2)
            for first, second in left.blocks_with(right)
        )
        return functools.reduce(torch.add, parts).to(left.values.dtype)

    def check(self, quantizers: Sequence[Any]) -> None:
        """Raise `RecipeError` unless both operands have a number format, and integers if it needs these."""
        formats = [quantizer.rounds_to for quantizer in quantizers if quantizer is not None]
        if len(formats) < len(quantizers) or None in formats:
            raise RecipeError("it takes a number format on both operands, alone or under scales")
        if self.integers and not all(number_format.is_integer for number_format in formats):
            raise RecipeError("it takes integers on both operands")


class Float32(Arithmetic):
    """The product in float32 (float64 for a float64 model): the reference."""

    name = "float32"
    simulates = False

    def multiply(self, left: QuantizedRows, right: QuantizedRows) -> Tensor:
        return left.values @ right.values.transpose(-1, -2)


class ExactArithmetic(Float32):
    """Computes some products faster, with the reference's numbers. An author writes one method: `lower`."""

    automatic: ClassVar[bool] = True
    """True if `auto` may choose it."""
    order: ClassVar[int] = 100
    """The place in the order in which `auto` asks the exact arithmetics: the lowest number is asked first."""

    @abstractmethod
    def lower(self, call: Call, roles: Sequence[str], quantizers: Sequence[Any]) -> Lowering | None: ...

    def lower_narrow(
        self, sums: NarrowSums, call: Call, roles: Sequence[str], quantizers: Sequence[Any]
    ) -> Lowering | None:
        """Plan a product whose sums of codes are narrow; None declines.

        Where sums do not wrap around, the lowering declines operands of which some sum may leave the range.
        """
        return None

    def worthwhile(self, call: Call) -> bool:
        """True if it is faster than float32 for this call on this machine; `auto` skips it otherwise."""
        return True


class Lowered(Protocol):
    """An operand's quantized rows in the form that an exact arithmetic multiplies.

    Where it has a method `values_into(out)`, that writes a weight's values into `out` [N, K], of the weight's dtype.
    """

    def values(self) -> Tensor:
        """Give the quantized rows in float32."""


class Lowering(ABC):
    """The plan of one exact product. A method gives None if the product would not be exact for an operand."""

    arithmetic: ClassVar[str]
    """The name of the arithmetic, for audits."""

    def __init__(self, quantizers: Sequence[Any]) -> None:
        self.quantizers = quantizers
        """The quantizers of the two operands."""

    @property
    def key(self) -> tuple[Any, ...]:
        """The arithmetic's name, and all else that tells its lowered operands apart from those of other plans."""
        return (self.arithmetic,)

    @property
    def rounds(self) -> bool:
        """True if the product is already rounded to the output's format."""
        return False

    def of(self, place: int) -> tuple[Any, ...]:
        """A key for the lowered operand at this place: two equal keys lower a tensor to the same result."""
        return *self.key, self.quantizers[place]

    @abstractmethod
    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> Any:
        """Quantize an operand's rows [..., K] into the lowered form, in `memory` if it is given."""

    def new(self, rows: Tensor) -> Any:
        """Quantize a weight's rows [N, K] into the lowered form."""
        return self.take(1, rows)

    @abstractmethod
    def again(self, rows: Tensor, kept: Any) -> Any:
        """Lower the rows of a weight that was overwritten with its quantized values. `kept` is the result of `keep`."""

    def pinned(self, rows: Tensor, scales: Any) -> Any:
        """Lower the rows of a weight that a transform has quantized, by the transform's scales (None: unknown)."""
        return None if scales is None else self.again(rows, scales)

    def keep(self, made: Any) -> Any:
        """Give the part of a result of `new` that `again` needs."""
        return made.scales

    def compact(self, made: Any) -> bool:
        """Tell if a weight's lowered form is smaller than its values, and serves any number of rows as well."""
        return False

    @abstractmethod
    def product(self, call: Call, first: Any, second: Any) -> Tensor | None:
        """Compute the call's product, with its bias, in float32."""


class Auto(Float32):
    """Computes each product in the fastest way that gives the reference's numbers: an exact arithmetic, or float32."""

    name = "auto"


FLOAT32, AUTO = Float32(), Auto()


def lowering_of(
    arithmetic: Arithmetic,
    exact: Sequence[ExactArithmetic],
    call: Call,
    roles: Sequence[str],
    quantizers: Sequence[Any],
) -> Lowering | None:
    """Plan a call under an arithmetic; `auto` takes the first of the `exact` arithmetics that does not decline.

    So does an arithmetic with narrow sums.
    """
    sums = arithmetic.narrow_sums
    if type(arithmetic) is not Auto and sums is None:
        return arithmetic.lower(call, roles, quantizers)
    for candidate in filter(lambda one: one.worthwhile(call), exact):
        if sums is None:
            lowering = candidate.lower(call, roles, quantizers)
        else:
            lowering = candidate.lower_narrow(sums, call, roles, quantizers)
        if lowering is not None:
            return lowering
    return None
