"""Quantizers: functions tensor -> tensor whose values come from a number format after scaling.

The base class, a plain callable in its place, and the straight-through gradient. Number formats are in
`qsim_core.formats.format`, scales in `qsim_core.quantizers.scheme`. Every tensor that a quantizer is given has the
reduction axis of its matmul last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import ValidationInfo, model_validator
from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.errors import QsimError
from qsim_core.formats.codes import Encoded

Granularity = Literal["tensor", "channel", "token", "element"] | int | tuple[int, int]


class SiteQuantizer(ABC):
    """Anything that can stand at a site: a `Quantizer`, or one that holds tensors, such as static scales.

    One method to write: `quantize`. Calling it is `quantize` with a straight-through gradient: the identity, and zero
    where `gradient_passes` is false; by default that is outside the range that can be represented.

    The properties answer what other modules ask about any quantizer. Each question has one property.
    """

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Round `x`: same shape, same dtype, same device; `x` itself is left alone."""

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Do the same, and put the result into `out` where that saves memory: shape, strides and dtype of `x`."""
        return self.quantize(x)

    def passes(self, x: Tensor) -> Tensor | None:
        """Tell which values lie inside the range that can be represented, as booleans; None: all."""
        return None

    def gradient_passes(self, x: Tensor) -> Tensor | None:
        """Tell where the straight-through gradient passes; by default where `passes` is true."""
        return self.passes(x)

    def bits_per_element(self, shape: torch.Size) -> float | None:
        """Count the bits stored for one element of a tensor of this shape, with its share of scales; None: unknown."""
        return None

    def scales(self, x: Tensor) -> Any:
        """Give the `Scales` under which the rows of `x` are rounded; None: there are none."""
        return None

    @property
    def granularity(self) -> Granularity | None:
        """The elements that share a scale: the tensor, a row, a block of n or r x c, no others; None: unknown."""
        return None

    @property
    def by_rows(self) -> bool:
        """True if each row is rounded by itself, independent of the other rows."""
        return False

    @property
    def sharing(self) -> frozenset[Granularity]:
        """The granularities of its scales, and of the scales of these: on what else a value may depend."""
        return frozenset() if self.granularity in (None, "element") else frozenset({self.granularity})

    @property
    def draws(self) -> bool:
        """True if it draws random numbers, as stochastic rounding does."""
        return False

    @property
    def learns(self) -> bool:
        """True if its scales are trained."""
        return False

    @property
    def version(self) -> int:
        """A number that changes whenever what it holds changes."""
        return 0

    def needs_held_scales(self, role: str) -> bool:
        """True if a site has to hold scales for it in this role: static ones, or scales that are trained."""
        return False

    @property
    def rounds_to(self) -> Any:
        """The number format of the values in units of their scales; None: there is none, or it is unknown."""
        return None

    @property
    def plain(self) -> Any:
        """The quantizer without the tensors that it holds; itself if it holds none."""
        return self

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return straight_through(x, self)
        return self.quantize(x)


class Quantizer(SiteQuantizer, Component):
    """Rounds a tensor. One method to write: `quantize`."""

    kind: ClassVar[str] = "quantizer"
    hook: ClassVar[str] = "qsim_quantizers"

    def encode(self, x: Tensor) -> Encoded:
        """Turn `x` into codes and scales. Raises `QsimError` for a value, or a quantizer, without codes."""
        raise QsimError(f"{self} has no codes: it says how values are rounded, not how they are stored")

    def decode(self, encoded: Encoded) -> Tensor:
        """Turn codes back into quantized values: `decode(encode(x))` is `quantize(x)`, bit for bit."""
        raise QsimError(f"{self} has no codes: it says how values are rounded, not how they are stored")

    @property
    def unscaled(self) -> Quantizer | None:
        """The number format that it rounds to, if it does nothing else; a scale rounded so saturates."""
        return None

    @property
    def rounds_to(self) -> Any:
        return self.unscaled

    @model_validator(mode="wrap")
    @classmethod
    def _from_callable(cls, value: Any, handler: Any, info: ValidationInfo) -> Self:
        """Accept a plain callable tensor -> tensor where a quantizer is expected."""
        if cls is Quantizer and callable(value) and not isinstance(value, Component | type):
            return Function(call=value)  # type: ignore[return-value]
        return handler(value)  # type: ignore[no-any-return]


class Function(Quantizer):
    """A plain callable tensor -> tensor in a quantizer's place; its text form names it but cannot be read back.

    The callable may work in place: it is given a copy.
    """

    name = "function"
    call: Callable[[Any], Any]

    def quantize(self, x: Tensor) -> Tensor:
        """Call it on a copy of `x`. Raises `QsimError` unless shape and dtype are those of `x`."""
        y = self.call(x.clone())
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            found = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else repr(type(y).__name__)
            raise QsimError(f"{self} turned a tensor {tuple(x.shape)} {x.dtype} into {found}; both must stay")
        return y

    def __call__(self, x: Tensor) -> Tensor:
        return self.quantize(x)  # the gradient is the callable's own

    def __str__(self) -> str:
        return f"function({getattr(self.call, '__name__', type(self.call).__name__)})"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, quantizer: SiteQuantizer, value: Tensor | None) -> Tensor:
        return quantizer.quantize(x) if value is None else value.detach().view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SiteQuantizer, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.quantizer = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        passes = ctx.quantizer.gradient_passes(x)
        return gradient if passes is None else torch.where(passes, gradient, 0.0), None, None


def straight_through(x: Tensor, quantizer: SiteQuantizer, value: Tensor | None = None) -> Tensor:
    """Give `quantizer.quantize(x)` the gradient of the identity where `quantizer.gradient_passes(x)`, else zero.

    `value` is the quantized tensor, if it is known already. Source: Bengio et al., arXiv 1308.3432, section 4.
    """
    result: Tensor = _StraightThrough.apply(x, quantizer, value)  # type: ignore[no-untyped-call]
    return result


def floating(x: Tensor) -> Tensor:
    """Return `x`, a floating-point tensor. Raises `QsimError` for another dtype."""
    if not x.is_floating_point():
        raise QsimError(f"a quantizer takes floating-point tensors, not {x.dtype}")
    return x


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Bring `y` into the dtype and the memory layout of `x`."""
    y = y.to(x.dtype)
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)
