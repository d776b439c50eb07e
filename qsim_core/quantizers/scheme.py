"""The combinator of all schemes: divide by a scale shared over a block, round to a format, multiply by the scale.

The scale is itself rounded by a quantizer, which may have scales again. Every scheme, from per-tensor integers to
NVFP4, is a choice of element format, granularity, scale, range and rule.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from qsim_core.errors import QsimError
from qsim_core.formats.accelerator import accelerated, accelerated_scales
from qsim_core.formats.codes import Encoded, as_codes
from qsim_core.formats.format import Format, unscaled_format
from qsim_core.formats.quantizer import Granularity, Quantizer, floating, laid_out_as
from qsim_core.formats.rounding import (
    ScaleRule,
    divided,
    power_of_two_scale,
    round_to_integer,
    working,
    working_dtype,
)
from qsim_core.quantizers.calibrators import Calibrator, MinMax
from qsim_core.quantizers.gradients import Gradient, passing
from qsim_core.quantizers.scales import Scales, has_scales

Weigh = Callable[[Tensor], Tensor]
"""Maps the errors [..., B, n] of blocks to those that a calibrator compares, in the same shape."""
LONGEST = 2**31 - 1
"""The most elements along an axis of a block; kernels count them in 64 bits."""


class Scheme(Quantizer):
    """Divides by a scale shared over a block, rounds to `element`, multiplies by the scale.

    An author writes one property: `granularity`. Blocks lie along the last axis, the matmul's reduction axis. The last
    block may be short:

        x [A, K], "tensor"             -> scales [1]
        x [A, K], "channel", "token"   -> scales [A, 1]
        x [A, K], n                    -> scales [A, ceil(K / n)]
        x [A, K], (r, c)               -> scales [ceil(A / r), ceil(K / c)]

    A symmetric scheme has scale = highest / reach(element), where `range` chooses the highest magnitude. Otherwise, for
    integers, scale = (highest - lowest) / (max - min), with zero inside the range. The zero point
    min - round(lowest / scale) makes zero exact. Quotients are computed in float32 (float64 for float64 input), and
    rounded before the zero point is added: a tie goes to the even multiple of the scale.
    `rule` may turn the scale into a power of two. `scale` rounds it, saturating at that format's largest value. The
    element saturates too, even if the format by itself overflows: rounding never turns a number into Inf or NaN.

    If `scale` has scales itself, these come from the whole range of each block, before `range` chooses a part of it. So
    a calibrator that tries several ranges tries the scales that will be used.

    A block of zeros, or one whose scale rounds to zero, becomes zero. A block with NaN or ±Inf has the scale NaN
    and becomes NaN as a whole, so that an overflow shows.
    """

    element: Format = Field(description="the number format of the scaled values")
    scale: Quantizer | None = Field(None, description="the quantizer of the scales; none keeps them in float32")
    symmetric: bool = Field(True, description="without a zero point; false: one for each scale, for integers")
    range: Calibrator = Field(MinMax(), description="the range that a scale covers: minmax, absmax, or one of a plugin")
    rule: ScaleRule = Field(
        "divide", description="how the range becomes a scale: divided, or a power of two (floor, ceil, even, rceil)"
    )

    static: bool = Field(
        False, description="one scale for all data, found in calibration data; false: anew for each tensor"
    )
    gradient: Gradient = Field(
        "clipped", description="of rounding, in training: clipped, piecewise, identity, or lsq, which trains the scales"
    )

    @property
    @abstractmethod
    def granularity(self) -> Granularity:
        """The elements that share a scale: "tensor", "channel", "token" (a row), n along a row, or (rows, columns)."""

    @property
    def sharing(self) -> frozenset[Granularity]:
        if self.static or self.learns:  # a value does not depend on any other value
            return frozenset()
        return super().sharing | (self.scale.sharing if self.scale is not None else frozenset())

    @property
    def by_rows(self) -> bool:
        rows = self.granularity[0] if isinstance(self.granularity, tuple) else 1
        return rows == 1 and self.granularity != "tensor" and (self.scale is None or self.scale.by_rows)

    @model_validator(mode="after")
    def _works_together(self) -> Self:
        element, shared = self.element, self.granularity
        if any(
            length > LONGEST
            for length in (shared if isinstance(shared, tuple) else (shared,))
            if isinstance(length, int)
        ):
            raise ValueError(f"a block has at most {LONGEST} elements along an axis, not {shared}")
        if element.min > 0:
            raise ValueError(f"{element} has no values at or below zero: it can be a scale, not an element")
        if self.symmetric and element.max < -element.min / 2:
            raise ValueError(
                f"{element} goes from {element.min:g} to {element.max:g}, and a scale maps the largest magnitude to "
                f"{element.max:g}; give it larger values above zero"
            )
        bare = unscaled_format(self.scale)
        if bare is not None and not bare.wide:
            raise ValueError(f"{self.scale} as a scale needs a scale of its own, like scaled({bare}, channel)")
        held = self.scale is not None and self.scale.needs_held_scales("input") and not self.static
        if held and (self.learns or self.scale_of_scales is None):
            raise ValueError(f"{self.scale} as a scale can hold one static scale, that of the tensor, and learns none")
        if not self.symmetric and not element.is_integer:
            raise ValueError(f"a zero point needs an integer format, not {element}; leave symmetric=false out")
        if not self.symmetric and self.rule != "divide":
            raise ValueError(f"rule {self.rule} is for symmetric scales; leave symmetric=false out")
        if element.reach != element.max and not (self.symmetric and self.rule == "divide"):
            option = f"rule {self.rule}" if self.symmetric else "a zero point"
            raise ValueError(f"{option} cannot follow the convention of {element}; leave the convention out")
        if self.static and not (self.granularity == "tensor" or isinstance(self.granularity, int)):
            raise ValueError(f"a static scale is for the tensor or for n along the row, not for {self.granularity}")
        if self.learns and self.granularity == "token":
            raise ValueError(
                "gradient=lsq cannot learn a scale for each token; it learns one for the tensor or for n along the row"
            )
        return self

    @property
    def rounds_to(self) -> Format:
        return self.element

    @property
    def learns(self) -> bool:
        """True if the scales are trained: a site holds them, and `range` gives their initial values only."""
        return self.gradient == "lsq"

    @property
    def draws(self) -> bool:
        return self.element.draws or (self.scale is not None and self.scale.draws)

    def needs_held_scales(self, role: str) -> bool:
        """True if scales are trained, or static and not those of a weight, which does not change."""
        return self.learns or ((self.static or self.scale_of_scales is not None) and role != "weight")

    @property
    def scale_of_scales(self) -> Scheme | None:
        """The quantizer of the scales, if one static scale for all of them is found in calibration data."""
        inner = self.scale
        if self.static or not isinstance(inner, Scheme) or not inner.static or inner.learns:
            return None
        return inner if inner.granularity == "tensor" and inner.symmetric and inner.scale is None else None

    @functools.cached_property
    def coded(self) -> Format:
        """The element format as the scheme uses it: with a zero point, all its codes are in use."""
        return self.element if self.symmetric else self.element.full()

    def quantize(self, x: Tensor) -> Tensor:
        """Round `x`. The result has the dtype of `x`; the arithmetic is float32 (float64 for float64 input)."""
        return Scheme.quantize_into(self, x, None)

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        if out is not None and type(self).quantize is not Scheme.quantize:  # a subclass overrides `quantize` alone
            return self.quantize(x)
        if floating(x).numel() == 0:
            return x.clone()
        fast = accelerated(self, x, out=out)
        if fast is not None:
            return fast
        blocks, exact, zero, of_scales = self.measured(x)
        scale = self.rounded_scale(exact, of_scales).unsqueeze(-1)
        return laid_out_as(x, self.join(self.units(blocks, scale, zero) * scale, x))

    def passes(self, x: Tensor) -> Tensor:
        """True where x / scale is inside the element format's range, or at most half a step outside; False for NaN."""
        return self._passing(x, "clipped")

    def gradient_passes(self, x: Tensor) -> Tensor:
        return self._passing(x, self.gradient)

    def _passing(self, x: Tensor, gradient: Gradient) -> Tensor:
        if x.numel() == 0:
            return torch.ones_like(x, dtype=torch.bool)
        _, exact, zero, of_scales = self.measured(x)
        return self.passes_at(x, self.rounded_scale(exact, of_scales).unsqueeze(-1), zero, gradient)

    def encode(self, x: Tensor) -> Encoded:
        """Encode `x`: codes in its shape, and one scale and zero point for each block.

        The codes of a block whose scale is NaN have no meaning.
        """
        if floating(x).numel() == 0:
            return Encoded(as_codes(x, self.coded.width), self.coded.width, x.dtype)
        _, exact, zero, of_scales = self.measured(x)
        scale = self.rounded_scale(exact, of_scales)
        scales: Tensor | Encoded = scale
        if self.scale is not None and of_scales is not None:
            scales = self.scale.encode_at(scale, of_scales.by_rows())
        elif self.scale is not None:
            scales = self.scale.encode(self._limited(exact))
        return self._encoded(x, scale, zero, scales)

    def encode_at(self, values: Tensor, known: Scales, of_scales: Scales | None = None) -> Encoded:
        """Encode values that were rounded under known scales: of each row, [A or 1, B or 1], or of each element.

        `of_scales` are the scales of the scales, in the same form; None: the scales are encoded as `encode` does.
        """
        nearest = self.replace(element=self.element.replace(rounding="even"))  # a quotient may be a little off
        scale, zero = (None if part is None else self._by_block(part, values) for part in known)
        assert scale is not None
        scales: Tensor | Encoded = scale
        if isinstance(self.scale, Scheme) and of_scales is not None:
            scales = self.scale.encode_at(scale, of_scales)
        elif self.scale is not None:
            scales = self.scale.encode(scale)
        return nearest._encoded(values, scale, None if zero is None else zero.unsqueeze(-1), scales)

    def _by_block(self, known: Tensor, like: Tensor) -> Tensor:
        """Bring what rows or elements have, [A or 1, B, K or 1], into the form of blocks [..., B]."""
        length = like.shape[-1]
        each = known if known.shape[-1] == length else known.repeat_interleave(self._block(like.shape)[1], -1)
        each = each[:, :length].expand(like.shape[:-1].numel(), length)
        return self.split(each.reshape(like.shape))[..., 0]

    def _encoded(self, x: Tensor, scale: Tensor, zero: Tensor | None, scales: Tensor | Encoded) -> Encoded:
        """Encode `x` under scales [..., B], which are `scales` in their stored form, and zero points [..., B, 1]."""
        element, scale = self.coded, scale.unsqueeze(-1)
        units = torch.where(scale.isnan(), element.max, self.units(self.split(working(x)), scale, zero))
        if zero is not None:
            zero = torch.where(scale.isnan(), 0.0, zero)
            units = units + zero
        zeros = None if zero is None else element.to_codes(zero.squeeze(-1))
        return Encoded(self.join(element.to_codes(units), x), element.width, x.dtype, scales, zeros)

    def decode(self, encoded: Encoded) -> Tensor:
        """Compute (code - zero point) * scale, in the dtype of the tensor that was encoded.

        Raises `QsimError` if another quantizer encoded it.
        """
        element = self.coded
        dtype = working_dtype(encoded.dtype)
        if encoded.codes.numel() == 0:
            return torch.empty_like(encoded.codes, dtype=encoded.dtype)
        scale = encoded.scales
        if isinstance(scale, Encoded) and self.scale is not None:
            scale = self.scale.decode(scale)
        if not isinstance(scale, Tensor):
            raise QsimError(f"these codes have no scales that {self} could decode")
        units = element.from_codes(self.split(encoded.codes), dtype)
        if encoded.zero_points is not None:
            units = units - element.from_codes(encoded.zero_points, dtype).unsqueeze(-1)
        return self.join(units * scale.unsqueeze(-1), encoded.codes).to(encoded.dtype)

    def scale_map(self, x: Tensor, weigh: Weigh | None = None) -> tuple[Tensor, Tensor | None]:
        """The scale and the zero point of each element of `x`, in its shape and in the dtype of the arithmetic.

        The calibrator compares errors as `weigh` maps them.
        """
        blocks, exact, zero, of_scales = self.measured(x, weigh)
        scale = self.rounded_scale(exact, of_scales).unsqueeze(-1)
        return self.join(scale.expand_as(blocks), x), None if zero is None else self.join(zero.expand_as(blocks), x)

    def scales_of_scales(self, x: Tensor) -> Scales | None:
        """The scales and zero points of the scale of each element of `x`, in its shape; None if scales have none."""
        blocks = self.split(working(x))
        of_scales = self._of_scales(self._ranged(blocks))
        if of_scales is None:
            return None
        each = (None if part is None else self.join(part.unsqueeze(-1).expand_as(blocks), x) for part in of_scales)
        return Scales(*each)  # type: ignore[arg-type]

    def whole_scales(self, x: Tensor) -> Tensor:
        """The scales [..., B], before rounding, that cover all values of each block of `x`."""
        return self.covering(*self.range.whole(self._ranged(self.split(working(x)))))[0]

    def round_at(self, x: Tensor, scale: Tensor, zero: Tensor | None, divisor: Tensor | None = None) -> Tensor:
        """Round `x` under given scales and zero points, which have the shape of `x` or broadcast to it.

        `divisor` is `divisor_of(scale)`. A caller that rounds many times under one scale computes it once.
        """
        return self.units(x, scale, zero, divisor).mul_(scale)

    def static_blocks(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The values of `x` by static scale, [B, values of all rows], and their counts as of `counts`."""
        blocks = self.split(working(x))
        counts = self.counts(x, blocks)
        return _over_rows(blocks), None if counts is None else _over_rows(counts)

    def fit(self, values: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Find static scales and zero points, [B, 1] each, for values [B, n] with counts [B, n] (None: one each)."""
        exact, zero, of_scales = self._exact(values, counts)
        return self.rounded_scale(exact, of_scales).unsqueeze(-1), zero

    def scales(self, x: Tensor) -> Scales:
        """Give the scales and zero points of `x`: [A, B] for its A rows of B blocks, or [1, 1] for the tensor."""
        fast: Scales | None = accelerated_scales(self, x)
        if fast is not None:
            return fast
        _, exact, zero, of_scales = self.measured(x)
        return Scales(self.rounded_scale(exact, of_scales), None if zero is None else zero.squeeze(-1)).by_rows()

    def quantize_at(self, x: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Quantize `x` under given scales and zero points [..., B, 1]; the result has the dtype of `x`."""
        if floating(x).numel() == 0:
            return x.clone()
        fast = accelerated(self, x, Scales.of(scale, zero), out)
        if fast is not None:
            return fast
        blocks = self.split(working(x))
        scale = scale.to(blocks.dtype)
        if zero is not None:
            zero = zero.to(blocks.dtype)
        return laid_out_as(x, self.join(self.units(blocks, scale, zero) * scale, x))

    def passes_at(self, x: Tensor, scale: Tensor, zero: Tensor | None, gradient: Gradient = "clipped") -> Tensor:
        """`passes`, or where another gradient does, with static scales."""
        units = self.split(working(x)) / divisor_of(scale)
        return self.join(passing(self.coded, units if zero is None else units + zero, gradient), x)

    def measured(self, x: Tensor, weigh: Weigh | None = None) -> tuple[Tensor, Tensor, Tensor | None, Scales | None]:
        """The blocks of `x` [..., B, n], their scales before rounding [..., B], and their zero points [..., B, 1].

        The last part are the scales and zero points of the scales, [..., B]; None if the scales have none.
        """
        blocks = self.split(working(x))
        return blocks, *self._exact(blocks, self.counts(x, blocks), weigh)

    def counts(self, x: Tensor, blocks: Tensor) -> Tensor | None:
        """1 for each value of a block and 0 for each zero that fills up a short one; None if no block is short."""
        if blocks.numel() == x.numel():
            return None
        return self.split(torch.ones(x.shape[-2:], dtype=blocks.dtype, device=x.device)).expand(blocks.shape)

    def _exact(
        self, blocks: Tensor, counts: Tensor | None = None, weigh: Weigh | None = None
    ) -> tuple[Tensor, Tensor | None, Scales | None]:
        """Find scales [..., B] before rounding by the calibrator `range`, zero points, and the scales of the scales."""
        values = self._ranged(blocks)
        of_scales = self._of_scales(values)

        def error(low: Tensor, high: Tensor) -> Tensor:
            exact, zero = self.covering(low, high, of_scales)
            scale = self.rounded_scale(exact, of_scales).unsqueeze(-1)
            change = self.units(blocks, scale, zero) * scale - blocks
            return change if weigh is None else weigh(change)

        return *self.covering(*self.range.range(values, error, counts), of_scales), of_scales

    def _of_scales(self, values: Tensor) -> Scales | None:
        """The scales of the scales [..., B], by the whole range of `values` [..., B, n]; None: there are none."""
        if not has_scales(self.scale):
            return None
        return Scales(*self.scale.scale_map(self.covering(*self.range.whole(values))[0]))

    def _ranged(self, blocks: Tensor) -> Tensor:
        """The values of which a range is chosen: magnitudes for a symmetric scheme."""
        if not self.symmetric:
            return blocks
        return blocks.abs() if self.element.min < 0 else blocks.clamp(min=0)

    def covering(self, low: Tensor, high: Tensor, of_scales: Scales | None = None) -> tuple[Tensor, Tensor | None]:
        """The scales before rounding [...], and zero points [..., 1], that cover ranges from `low` to `high` [...]."""
        element = self.coded
        if not self.symmetric:
            low, high = low.clamp(max=0), high.clamp(min=0)
            steps = element.max - element.min
            exact = divided(high - low, steps)
            without_overflow = divided(high, steps) - divided(low, steps)  # high - low may be Inf
            exact = _finite(torch.where(exact.isinf(), without_overflow, exact))
            offset = (low / divisor_of(self.rounded_scale(exact, of_scales))).round()
            return exact, (element.min - offset).clamp(element.min, element.max).unsqueeze(-1)
        if self.rule == "divide":
            return _finite(divided(high + 0.0, element.reach)), None  # adding 0 turns a highest value of -0 into 0
        return power_of_two_scale(high, self.rule, element.max, element.beyond), None

    def _limited(self, exact: Tensor) -> Tensor:
        """Clamp scales to the largest value of their format, if they have no scales themselves."""
        bare = unscaled_format(self.scale)
        return exact if bare is None else exact.clamp(max=bare.max)

    def rounded_scale(self, exact: Tensor, of_scales: Scales | None = None) -> Tensor:
        """Round scales by the quantizer `scale`; Inf and NaN become NaN. `of_scales` are the scales of the scales."""
        if has_scales(self.scale) and of_scales is not None:
            return _finite(self.scale.round_at(exact, *of_scales))
        return exact if self.scale is None else _finite(self.scale.quantize(self._limited(exact)))

    def units(self, blocks: Tensor, scale: Tensor, zero: Tensor | None, divisor: Tensor | None = None) -> Tensor:
        """Divide blocks by their scales and round to the element format; with a zero point, less that zero point."""
        element = self.coded
        units = blocks / (divisor_of(scale) if divisor is None else divisor)
        if zero is not None:
            return round_to_integer(units, element.min - zero, element.max - zero, element.rounding, element.seed)
        if element.overflow is not None:
            units = units.clamp(element.min, element.max)
        return element.round(units)

    def split(self, x: Tensor) -> Tensor:
        """Split `x` into blocks [..., blocks, elements of a block]; zeros fill up a short last block."""
        if self.granularity == "tensor":
            return x.reshape(1, -1)
        rows, columns = self._block(x.shape)
        x = x.reshape(1, 1) if x.dim() == 0 else x
        if isinstance(self.granularity, tuple):
            below, beside = -x.shape[-2] % rows, -x.shape[-1] % columns
            tiles = F.pad(x, (0, beside, 0, below)).unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
            tiled: Tensor = tiles.transpose(-2, -3).flatten(-2)
            return tiled
        missing = -x.shape[-1] % columns
        if missing:
            x = F.pad(x, (0, missing))
        blocks: Tensor = x.unflatten(-1, (-1, columns))
        return blocks

    def join(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Undo `split`: put blocks back into the shape of the tensor `like`."""
        if self.granularity == "tensor":
            return blocks.reshape(like.shape)
        if isinstance(self.granularity, tuple):
            tiles = blocks.unflatten(-1, self._block(like.shape)).transpose(-2, -3)
            joined: Tensor = tiles.flatten(-4, -3).flatten(-2)
            return joined[..., : like.shape[-2], : like.shape[-1]]
        return blocks.flatten(-2)[..., : like.shape[-1] if like.dim() else 1].reshape(like.shape)

    def blocks_of(self, shape: torch.Size) -> int:
        """Count the blocks along a row of a tensor of this shape; 1 if the whole tensor shares a scale."""
        return 1 if self.granularity == "tensor" else math.ceil((shape or (1,))[-1] / self._block(shape)[1])

    def _block(self, shape: torch.Size) -> tuple[int, int]:
        """The rows and columns of a block, at most those of the tensor."""
        length = shape[-1] if shape else 1
        if isinstance(self.granularity, int):
            return 1, max(1, min(self.granularity, length))
        if not isinstance(self.granularity, tuple):
            return 1, max(1, length)
        if len(shape) < 2:
            raise QsimError(f"{self} shares scales over rows and columns; a tensor of shape {tuple(shape)} has no rows")
        return max(1, min(self.granularity[0], shape[-2])), max(1, min(self.granularity[1], length))

    def bits_per_element(self, shape: torch.Size) -> float | None:
        """Count the element's width, and its share of the bits of scales and zero points.

        A scale that is not rounded has 32 bits. A static scale adds none: it is stored once for all data.
        """
        elements = math.prod(shape)
        width = float(self.element.width)
        if elements == 0 or self.static:
            return width
        if self.granularity == "tensor":
            scales = torch.Size([1])
        else:
            rows, columns = self._block(shape)
            length = shape[-1] if shape else 1
            height = shape[-2] if len(shape) > 1 else 1
            scales = torch.Size([*shape[:-2], math.ceil(height / rows), math.ceil(length / columns)])
        bits = 32.0 if self.scale is None else self.scale.bits_per_element(scales)
        if bits is None:
            return None
        if not self.symmetric:
            bits += width
        return width + bits * scales.numel() / elements


def _over_rows(blocks: Tensor) -> Tensor:
    """Blocks [..., B, n] as [B, values of all rows]."""
    return blocks.flatten(0, -3).movedim(-2, 0).flatten(1) if blocks.dim() > 2 else blocks


def _finite(scale: Tensor) -> Tensor:
    """Replace Inf by NaN."""
    return torch.where(scale.isfinite(), scale, torch.nan)


def divisor_of(scale: Tensor) -> Tensor:
    """The divisor for values under a scale: the scale, or 1 where it is 0."""
    return torch.where(scale == 0, 1.0, scale)
