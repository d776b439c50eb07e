"""Quantizers: functions tensor -> tensor whose values come from a number format after scaling.

The base class, a plain callable in its place, and the straight-through gradient. Number formats are in
`qsim_core.formats.format`, scales in `qsim_core.quantizers.scheme`. The reduction axis of the matmul comes last in every tensor that a
quantizer is handed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import ValidationInfo, model_validator
from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.errors import QsimError
from qsim_core.formats.codes import Encoded


class Multiplier(Protocol):
    """What multiplies two operands in place of a float matmul: a frozen value, equal to others of the same options."""

    def __call__(self, left: Tensor, right: Tensor, quantizers: tuple[Quantizer, ...]) -> Tensor:
        """Rows `[..., M, K]` and `[..., N, K]`, each quantized by its quantizer, to `[..., M, N]`."""


Granularity = Literal["tensor", "channel", "token", "element"] | int | tuple[int, int]


class Quantizer(Component):
    """What rounds a tensor. One method to write: `quantize`.

    Calling a quantizer is `quantize` with a straight-through gradient: the identity, and zero where `gradient_passes`
    says no; by default that is where the value lies outside what can be represented.
    """

    kind: ClassVar[str] = "quantizer"
    hook: ClassVar[str] = "qsim_quantizers"

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """`x` rounded: same shape, same dtype, same device; `x` itself is left alone."""

    def passes(self, x: Tensor) -> Tensor | None:
        """Where a value lies inside what can be represented, as booleans; `None` means everywhere."""
        return None

    def gradient_passes(self, x: Tensor) -> Tensor | None:
        """Where the straight-through gradient passes; by default where the value does."""
        return self.passes(x)

    def encode(self, x: Tensor) -> Encoded:
        """`x` as codes and scales. Raises `QsimError` for a value without a code, or a quantizer without codes."""
        raise QsimError(f"{self} has no codes: it says how values are rounded, not how they are stored")

    def decode(self, encoded: Encoded) -> Tensor:
        """What was encoded, quantized: `decode(encode(x))` is `quantize(x)`, bit for bit."""
        raise QsimError(f"{self} has no codes: it says how values are rounded, not how they are stored")

    def bits_per_element(self, shape: torch.Size) -> float | None:
        """Bits stored for one element of a tensor of this shape, its share of the scales counted; None: unknown."""
        return None

    @property
    def granularity(self) -> Granularity | None:
        """Which elements share a scale: the tensor, a row, a block of n or r x c, no others; None: unknown."""
        return None

    @property
    def by_rows(self) -> bool:
        """Whether each row is rounded by itself, whatever the others hold."""
        return False

    @property
    def unscaled(self) -> Quantizer | None:
        """The number format that it rounds to as it is, if it does nothing else; a scale rounded so saturates."""
        return None

    @property
    def multiplier(self) -> Multiplier | None:
        """What multiplies operands that are both quantized by it or its like; None: a float matmul."""
        return None

    @property
    def sharing(self) -> frozenset[Granularity]:
        """The granularities of its scales, and of their scales in turn: what else a value may depend on."""
        return frozenset() if self.granularity in (None, "element") else frozenset({self.granularity})

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return straight_through(x, self)
        return self.quantize(x)

    @model_validator(mode="wrap")
    @classmethod
    def _from_callable(cls, value: Any, handler: Any, info: ValidationInfo) -> Self:
        """Where a quantizer is expected, a plain callable tensor -> tensor will do."""
        if cls is Quantizer and callable(value) and not isinstance(value, Component | type):
            return Function(call=value)  # type: ignore[return-value]
        return handler(value)  # type: ignore[no-any-return]


class Function(Quantizer):
    """A plain callable tensor -> tensor in a quantizer's place; its text form names it but cannot be read back.

    It may work in place: what it is handed is its own.
    """

    name = "function"
    call: Callable[[Any], Any]

    def quantize(self, x: Tensor) -> Tensor:
        """What the callable makes of a copy of `x`. Raises `QsimError` unless shape and dtype are those of `x`."""
        y = self.call(x.clone())
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            found = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else repr(type(y).__name__)
            raise QsimError(f"{self} turned a tensor {tuple(x.shape)} {x.dtype} into {found}; both must stay")
        return y

    def __call__(self, x: Tensor) -> Tensor:
        return self.quantize(x)  # whoever gives a function gives its gradient

    def __str__(self) -> str:
        return f"function({getattr(self.call, '__name__', type(self.call).__name__)})"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, quantizer: Quantizer, value: Tensor | None) -> Tensor:
        return quantizer.quantize(x) if value is None else value.detach().view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Quantizer, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.quantizer = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        passes = ctx.quantizer.gradient_passes(x)
        return gradient if passes is None else torch.where(passes, gradient, 0.0), None, None


def straight_through(x: Tensor, quantizer: Quantizer, value: Tensor | None = None) -> Tensor:
    """`quantizer.quantize(x)` whose gradient is the identity where `quantizer.gradient_passes(x)`, else zero.

    `value` is the quantized tensor, if it is known already. Source: Bengio et al., arXiv 1308.3432, section 4.
    """
    result: Tensor = _StraightThrough.apply(x, quantizer, value)  # type: ignore[no-untyped-call]
    return result


def floating(x: Tensor) -> Tensor:
    """`x`, if it is a floating-point tensor; else a `QsimError`."""
    if not x.is_floating_point():
        raise QsimError(f"a quantizer takes floating-point tensors, not {x.dtype}")
    return x


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """`y` in the dtype and the memory layout of `x`."""
    y = y.to(x.dtype)
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)
