"""Quantizers: functions tensor -> tensor whose values come from a number format after scaling.

A *format* is the simplest one; `Scaled` is the combinator: divide by a scale shared over a block, apply the
format, multiply back, where the scale is itself rounded by a quantizer. The reduction axis of the matmul comes
last in every tensor that a quantizer is handed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, ValidationInfo, model_validator
from torch import Tensor

from qsim_core.component import Component
from qsim_core.errors import QsimError
from qsim_core.numerics import working

Granularity = Literal["tensor", "channel", "token", "element"] | int


class Quantizer(Component):
    """What rounds a tensor. One method to write: `quantize`.

    Calling a quantizer is `quantize` with a straight-through gradient: the identity, and zero where `passes`
    says that the value lies outside what can be represented.
    """

    kind: ClassVar[str] = "quantizer"

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """`x` rounded: same shape, same dtype, same device; `x` itself is left alone."""

    def passes(self, x: Tensor) -> Tensor | None:
        """Where the straight-through gradient passes, as booleans; `None` means everywhere."""
        return None

    def bits_per_element(self, shape: torch.Size) -> float | None:
        """Bits stored for one element of a tensor of this shape, its share of the scales counted; None: unknown."""
        return None

    @property
    def granularity(self) -> Granularity | None:
        """Which elements share a scale: the tensor, a row, a block of n, no others; None: unknown."""
        return None

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
    """A plain callable tensor -> tensor in a quantizer's place; its text form names it but cannot be read back."""

    name = "function"
    call: Callable[[Any], Any]

    def quantize(self, x: Tensor) -> Tensor:
        """What the callable makes of `x`. Raises `QsimError` unless shape and dtype are those of `x`."""
        y = self.call(x)
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            found = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else repr(type(y).__name__)
            raise QsimError(f"{self} turned a tensor {tuple(x.shape)} {x.dtype} into {found}; both must stay")
        return y

    def __call__(self, x: Tensor) -> Tensor:
        return self.quantize(x)  # whoever gives a function gives its gradient

    def __str__(self) -> str:
        return f"function({getattr(self.call, '__name__', type(self.call).__name__)})"


class Format(Quantizer):
    """A set of representable values around zero; quantizing rounds to the nearest, without any scale."""

    kind: ClassVar[str] = "format"

    @property
    @abstractmethod
    def max(self) -> float:
        """The largest finite value; a scale maps the largest magnitude of its block to it."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Bits of one code."""

    @property
    @abstractmethod
    def last_step(self) -> float:
        """The distance from `max` to the value below it."""

    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """`x` (float32 or float64) rounded to the format's values; what an author of a format writes."""

    def quantize(self, x: Tensor) -> Tensor:
        """`x` rounded without a scale, and back in its own dtype."""
        return self.round(working(floating(x))).to(x.dtype)

    def passes(self, x: Tensor) -> Tensor:
        """True where |x| is at most `max` and half a step; NaN does not pass."""
        return x.abs() <= self.max + self.last_step / 2

    def bits_per_element(self, shape: torch.Size) -> float:
        return float(self.width)

    @property
    def granularity(self) -> Granularity:
        return "element"


def _block(value: Any) -> Any:
    words = ("tensor", "channel", "token")
    if value in words or (type(value) is int and value > 0):
        return value
    raise ValueError(f"a block is tensor, channel, token or a whole number from 1 on, not {value!r}")


class Scaled(Quantizer):
    """Divide by a scale shared over a block, round to `element`, multiply back.

    scale = max|x| / max(element) over the block, computed in float32 (float64 for float64 input) and rounded by
    `scale`, saturating at that format's largest value. Blocks lie along the last axis, the matmul's reduction axis:

        x [A, K], block "tensor"            -> scales []
        x [A, K], block "channel", "token"  -> scales [A, 1]
        x [A, K], block n                   -> scales [A, ceil(K / n)], the last block may be short

    A block of zeros, or whose scale rounds to zero, becomes zero. A block that holds NaN or ±Inf has no scale
    and becomes NaN as a whole: an overflow is not hidden.
    """

    name = "scaled"
    element: Format = Field(description="the number format of the scaled values")
    block: Annotated[Literal["tensor", "channel", "token"] | int, BeforeValidator(_block)] = Field(
        "tensor", description="which elements share a scale: tensor, channel, token (a row), or n along the row"
    )
    scale: Quantizer | None = Field(None, description="what rounds the scales; none keeps them in float32")

    def quantize(self, x: Tensor) -> Tensor:
        """`x` rounded, in its own dtype; the arithmetic is float32's (float64's for float64)."""
        if floating(x).numel() == 0:
            return x.clone()
        blocks = self.split(working(x))
        scale = self.scales(blocks)
        divisor = torch.where(scale == 0, 1.0, scale)
        return self.join(self.element.round(blocks / divisor) * scale, x).to(x.dtype)

    def passes(self, x: Tensor) -> Tensor:
        """True where |x| / scale is at most `max` and half a step of the element format."""
        if x.numel() == 0:
            return torch.ones_like(x, dtype=torch.bool)
        blocks = self.split(working(x))
        scale = self.scales(blocks)
        return self.join(self.element.passes(blocks / torch.where(scale == 0, 1.0, scale)), x)

    def split(self, x: Tensor) -> Tensor:
        """`x` as [..., blocks, elements of a block]; a short last block is filled up with zeros."""
        if self.block == "tensor":
            return x.reshape(1, -1)
        rows = x.reshape(1, 1) if x.dim() == 0 else x
        length = min(self.block, rows.shape[-1]) if isinstance(self.block, int) else rows.shape[-1]
        missing = -rows.shape[-1] % length
        blocks: Tensor = (F.pad(rows, (0, missing)) if missing else rows).unflatten(-1, (-1, length))
        return blocks

    def join(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `split`: blocks back in the shape of the tensor they came from."""
        if self.block == "tensor":
            return blocks.reshape(like.shape)
        return blocks.flatten(-2)[..., : like.shape[-1] if like.dim() else 1].reshape(like.shape)

    def scales(self, blocks: Tensor) -> Tensor:
        """One scale for each block, [..., blocks, 1], rounded; NaN where there is none."""
        exact = blocks.abs().amax(-1) / self.element.max
        scale = exact
        if self.scale is not None:
            limit = getattr(self.scale, "max", math.inf)
            scale = torch.where(exact.isfinite(), self.scale.quantize(exact.clamp(max=limit)), torch.nan)
        return torch.where(exact.isfinite(), scale, torch.nan).unsqueeze(-1)

    def bits_per_element(self, shape: torch.Size) -> float | None:
        """The element's width plus the scales' bits, spread over the elements (an unrounded scale has 32)."""
        rows, length = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        if self.block == "tensor":
            scales = torch.Size([1])
        else:
            per_row = math.ceil(length / self.block) if isinstance(self.block, int) else 1
            scales = torch.Size([rows, per_row])
        each = 32.0 if self.scale is None else self.scale.bits_per_element(scales)
        if each is None or rows * length == 0:
            return None if each is None else float(self.element.width)
        return self.element.width + each * scales.numel() / (rows * length)

    @property
    def granularity(self) -> Granularity:
        return self.block


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, value: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.quantizer = quantizer
        return quantizer.quantize(x) if value is None else value.detach().view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        passes = ctx.quantizer.passes(x)
        return gradient if passes is None else torch.where(passes, gradient, 0.0), None, None


def straight_through(x: Tensor, quantizer: Quantizer, value: Tensor | None = None) -> Tensor:
    """`quantizer.quantize(x)` whose gradient is the identity where `quantizer.passes(x)`, else zero.

    `value` is the quantized tensor, if it is known already. Source: Bengio et al., arXiv 1308.3432, section 4.
    """
    result: Tensor = _StraightThrough.apply(x, quantizer, value)  # type: ignore[no-untyped-call]
    return result


def floating(x: Tensor) -> Tensor:
    """`x`, if it is a floating-point tensor; else a `QsimError`."""
    if not x.is_floating_point():
        raise QsimError(f"a quantizer takes floating-point tensors, not {x.dtype}")
    return x
