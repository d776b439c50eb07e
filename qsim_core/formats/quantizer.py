"""Quantizers: functions tensor -> tensor whose values come from a number format after scaling.

This module has the base class, the wrapper of a plain callable, and the straight-through gradient. Number formats are
in `qsim_core.formats.format`, scales in `qsim_core.quantizers.scheme`. A quantizer gets every tensor with the
reduction axis of its matmul last.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import ValidationInfo, model_validator
from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.errors import QsimError
from qsim_core.formats.codes import Encoded
from qsim_core.formats.uncompiled import uncompiled

Granularity = Literal["tensor", "channel", "token", "element"] | int | tuple[int, int]
"""The elements that share a scale: the tensor, a row (channel, token), n along a row, a tile of (rows, columns).

`element` means that there are no scales.
"""


class SiteQuantizer(ABC):
    """A quantizer at a site: a `Quantizer`, or one that holds tensors, such as static scales.

    An author writes one method: `quantize`. A call of the object is `quantize` with a straight-through gradient: the
    identity where `gradient_passes` is true, else zero. By default it is zero outside the representable range.

    The properties describe the quantizer to other modules.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("quantize", "quantize_into", "encode", "decode"):
            uncompiled(cls.__dict__.get(name))

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Round `x`. The result has the shape, dtype and device of `x`; `x` itself is not changed."""

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Quantize `x`, and put the result into `out` if that saves memory.

        `out` has the shape, strides and dtype of `x`. It may be `x` itself, which is then not needed any more.
        """
        return self.quantize(x)

    def passes(self, x: Tensor) -> Tensor | None:
        """Tell which values lie inside the representable range, as booleans; None: all."""
        return None

    def gradient_passes(self, x: Tensor) -> Tensor | None:
        """Tell where the straight-through gradient passes; by default where `passes` is true."""
        return self.passes(x)

    def bits_per_element(self, shape: torch.Size) -> float | None:
        """Count the bits stored for one element of a tensor of this shape, with its share of scales; None: unknown."""
        return None

    def scales(self, x: Tensor) -> Any:
        """Give the `Scales` under which the rows of `x` are rounded; None without scales."""
        return None

    @property
    def granularity(self) -> Granularity | None:
        """The elements that share a scale, as a `Granularity`; None: unknown."""
        return None

    @property
    def by_rows(self) -> bool:
        """True if each row is rounded independently of the other rows."""
        return False

    @property
    def sharing(self) -> frozenset[Granularity]:
        """The granularities of its scales, and of the scales' scales: a value depends on the elements they cover."""
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
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that it holds, such as static scales: what it quantized is quantized again when they change."""
        return ()

    def needs_held_scales(self, role: str) -> bool:
        """True if a site has to hold its scales in this role: static scales, or scales that are trained."""
        return False

    @property
    def rounds_to(self) -> Any:
        """The number format of the values in units of their scales; None: there is none, or it is unknown."""
        return None

    @property
    def appended(self) -> int:
        """The columns that it appends to each row: hardware multiplies them too, by columns that the weight repeats."""
        return 0

    @property
    def plain(self) -> Any:
        """The quantizer without the tensors that it holds; itself if it holds none."""
        return self

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return straight_through(x, self)
        return self.quantize(x)


class Around(SiteQuantizer):
    """A quantizer around another one, `inner`, which has the same properties."""

    @property
    @abstractmethod
    def inner(self) -> SiteQuantizer:
        """The other quantizer."""

    def bits_per_element(self, shape: torch.Size) -> float | None:
        return self.inner.bits_per_element(shape)

    @property
    def granularity(self) -> Granularity | None:
        return self.inner.granularity

    @property
    def by_rows(self) -> bool:
        return self.inner.by_rows

    @property
    def sharing(self) -> frozenset[Granularity]:
        return self.inner.sharing

    @property
    def draws(self) -> bool:
        return self.inner.draws

    @property
    def rounds_to(self) -> Any:
        return self.inner.rounds_to


def _checked(quantize: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    @functools.wraps(quantize)
    def checked(self: Any, x: Tensor) -> Tensor:
        y: Any = quantize(self, x)
        if isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype:
            return y
        found = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else repr(type(y).__name__)
        raise QsimError(f"{self} turned a tensor {tuple(x.shape)} {x.dtype} into {found}; shape and dtype must stay")

    return checked


class Quantizer(SiteQuantizer, Component):
    """Rounds a tensor. An author writes one method: `quantize`.

    A `quantize` whose result has another shape or dtype than its argument raises `QsimError`.
    """

    kind: ClassVar[str] = "quantizer"
    hook: ClassVar[str] = "qsim_quantizers"

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "quantize" in vars(cls):
            cls.quantize = _checked(cls.quantize)  # type: ignore[assignment, method-assign]

    def encode(self, x: Tensor) -> Encoded:
        """Turn `x` into codes and scales. Raises `QsimError` for a value without a code, or if there are no codes."""
        raise QsimError(f"{self} has no codes: it says how values are rounded, not how they are stored")

    def encode_at(self, values: Tensor, known: Any, of_scales: Any = None) -> Encoded:
        """Encode values that were rounded under known `Scales`, and these under theirs; without scales as `encode`."""
        return self.encode(values)

    def decode(self, encoded: Encoded) -> Tensor:
        """Turn codes back into quantized values: `decode(encode(x))` is `quantize(x)`, bit for bit."""
        raise QsimError(f"{self} has no codes: it says how values are rounded, not how they are stored")

    @property
    def unscaled(self) -> Quantizer | None:
        """The number format, if the quantizer only rounds to it, without a scale; else None.

        A scale that such a quantizer rounds is limited to the format's largest value first.
        """
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
    """A plain callable tensor -> tensor as a quantizer. Its text form names the callable and cannot be read back.

    The callable gets a copy of the tensor, so it may work in place.
    """

    name = "function"
    call: Callable[[Any], Any]

    def quantize(self, x: Tensor) -> Tensor:
        """Apply the callable to a copy of `x`."""
        y: Tensor = self.call(x.clone())
        return y

    def __call__(self, x: Tensor) -> Tensor:
        return self.quantize(x)  # the gradient is the callable's own

    def __str__(self) -> str:
        return f"function({getattr(self.call, '__name__', type(self.call).__name__)})"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, quantizer: Any, value: Tensor | None) -> Tensor:
        return quantizer.quantize(x) if value is None else value.detach().view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.quantizer = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        passes = None if ctx.quantizer is None else ctx.quantizer.gradient_passes(x)
        return gradient if passes is None else torch.where(passes, gradient, 0.0), None, None


def straight_through(x: Tensor, quantizer: SiteQuantizer | None, value: Tensor | None = None) -> Tensor:
    """Compute `quantizer.quantize(x)` with a straight-through gradient.

    The gradient is that of the identity where `quantizer.gradient_passes(x)`, and zero elsewhere. `value` is the
    quantized tensor, if it is already known. With it the quantizer may be None: the gradient passes everywhere. Source:
    Bengio et al., arXiv 1308.3432, section 4.
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
