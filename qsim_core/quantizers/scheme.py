"""The one combinator: divide by a scale shared over a block, round to a format, multiply back.

The scale is itself rounded by a quantizer, which may again be scaled. Every scheme, from per-tensor integers to
NVFP4, is a choice of element format, granularity, scale, range and rule.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from qsim_core.errors import QsimError
from qsim_core.formats.accelerator import accelerated
from qsim_core.formats.codes import Encoded, as_codes
from qsim_core.formats.format import Format, unscaled_format
from qsim_core.formats.quantizer import Granularity, Quantizer, floating, laid_out_as
from qsim_core.formats.rounding import ScaleRule, divided, power_of_two_scale, round_to_integer, working
from qsim_core.quantizers.calibrators import Calibrator, MinMax
from qsim_core.quantizers.gradients import Gradient, passing
from qsim_core.quantizers.scales import Scales


class Scheme(Quantizer):
    """Divide by a scale shared over a block, round to `element`, multiply back. One property to write: `granularity`.

    Blocks lie along the last axis, the matmul's reduction axis, the last one may be short:

        x [A, K], "tensor"             -> scales [1]
        x [A, K], "channel", "token"   -> scales [A, 1]
        x [A, K], n                    -> scales [A, ceil(K / n)]
        x [A, K], (r, c)               -> scales [ceil(A / r), ceil(K / c)]

    Symmetric: scale = highest / reach(element), where `range` says what the highest magnitude is. Otherwise, for
    integers: scale = (highest - lowest) / (max - min) with zero inside the range, and a zero point
    min - round(lowest / scale) that makes zero exact. The quotients are float32's (float64's for float64 input).
    `rule` may make a power of two of the scale; `scale` rounds it, saturating at that format's largest value. The
    element saturates too, whatever it does outside of a scheme: rounding alone never makes Inf or NaN of a number.

    A block of zeros, or whose scale rounds to zero, becomes zero. A block that holds NaN or ±Inf has no scale
    and becomes NaN as a whole: an overflow is not hidden.
    """

    element: Format = Field(description="the number format of the scaled values")
    scale: Quantizer | None = Field(None, description="what rounds the scales; none keeps them in float32")
    symmetric: bool = Field(True, description="no zero point; false: one for each scale, for integers")
    range: Calibrator = Field(MinMax(), description="what a scale covers: minmax, absmax, percentile, mse")
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
        """Which elements share a scale: "tensor", "channel" or "token" (a row), n along a row, or (rows, columns)."""

    @property
    def sharing(self) -> frozenset[Granularity]:
        if self.static or self.learns:  # no other value has a say
            return frozenset()
        return super().sharing | (self.scale.sharing if self.scale is not None else frozenset())

    @property
    def by_rows(self) -> bool:
        rows = self.granularity[0] if isinstance(self.granularity, tuple) else 1
        return rows == 1 and self.granularity != "tensor" and (self.scale is None or self.scale.by_rows)

    @model_validator(mode="after")
    def _works_together(self) -> Self:
        element, scale = self.element, self.scale
        if element.min > 0:
            raise ValueError(f"{element} holds no zero and nothing below: it can be a scale, not an element")
        if self.symmetric and element.max < -element.min / 2:
            raise ValueError(
                f"{element} goes down to {element.min:g} and up to {element.max:g} only, and it is this that a scale "
                f"maps the largest magnitude to; give it values above zero too"
            )
        if scale is not None and (bare := unscaled_format(scale)) is not None and not bare.wide:
            raise ValueError(f"{scale} as a scale needs a scale of its own, like scaled({bare}, channel)")
        if not self.symmetric and not element.is_integer:
            raise ValueError(f"a zero point shifts whole numbers; {element} is none, so leave symmetric=false out")
        if not self.symmetric and self.rule != "divide":
            raise ValueError(f"rule {self.rule} is for symmetric scales; leave symmetric=false out")
        if element.reach != element.max and not (self.symmetric and self.rule == "divide"):
            rival = f"rule {self.rule}" if self.symmetric else "a zero point"
            raise ValueError(f"{rival} leaves {element} no say in what a scale maps to; leave its convention out")
        if self.static and not (self.granularity == "tensor" or isinstance(self.granularity, int)):
            raise ValueError(f"a static scale is for the tensor or for n along the row, not for {self.granularity}")
        if self.learns and self.granularity == "token":
            raise ValueError("tokens come and go: gradient=lsq learns a scale for the tensor or for n along the row")
        return self

    @property
    def rounds_to(self) -> Format:
        return self.element

    @property
    def learns(self) -> bool:
        """True if the scales are trained: a site holds them, and `range` only gives their start."""
        return self.gradient == "lsq"

    @property
    def draws(self) -> bool:
        return self.element.draws or (self.scale is not None and self.scale.draws)

    def needs_held_scales(self, role: str) -> bool:
        """True if the scales are trained, or static and not those of a weight, which does not change."""
        return self.learns or (self.static and role != "weight")

    @functools.cached_property
    def coded(self) -> Format:
        """The element format as it is used: with a zero point, every code of it."""
        return self.element if self.symmetric else self.element.full()

    def quantize(self, x: Tensor) -> Tensor:
        """Round `x`, in its own dtype; the arithmetic is float32's (float64's for float64)."""
        return Scheme.quantize_into(self, x, None)

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        if out is not None and type(self).quantize is not Scheme.quantize:  # a scheme with a way of its own
            return self.quantize(x)
        if floating(x).numel() == 0:
            return x.clone()
        if (fast := accelerated(self, x, out=out)) is not None:
            return fast
        blocks, exact, zero = self.measured(x)
        scale = self.rounded_scale(exact).unsqueeze(-1)
        return laid_out_as(x, self.join(self.units(blocks, scale, zero) * scale, x))

    def passes(self, x: Tensor) -> Tensor:
        """True where x / scale is at most half a step outside the element format; NaN does not pass."""
        return self._passing(x, "clipped")

    def gradient_passes(self, x: Tensor) -> Tensor:
        return self._passing(x, self.gradient)

    def _passing(self, x: Tensor, gradient: Gradient) -> Tensor:
        if x.numel() == 0:
            return torch.ones_like(x, dtype=torch.bool)
        blocks, exact, zero = self.measured(x)
        units = blocks / divisor_of(self.rounded_scale(exact).unsqueeze(-1))
        return self.join(passing(self.coded, units if zero is None else units + zero, gradient), x)

    def encode(self, x: Tensor) -> Encoded:
        """Codes in the shape of `x`, scales and zero points one for each block. Where a scale is NaN no code counts."""
        element = self.coded
        if floating(x).numel() == 0:
            return Encoded(as_codes(x, element.width), element.width, x.dtype)
        blocks, exact, zero = self.measured(x)
        scale = self.rounded_scale(exact).unsqueeze(-1)
        units = torch.where(scale.isnan(), element.max, self.units(blocks, scale, zero))
        if zero is not None:
            zero = torch.where(scale.isnan(), 0.0, zero)
            units = units + zero
        return Encoded(
            codes=self.join(element.to_codes(units), x),
            width=element.width,
            dtype=x.dtype,
            scales=exact if self.scale is None else self.scale.encode(self._limited(exact)),
            zero_points=None if zero is None else element.to_codes(zero.squeeze(-1)),
        )

    def decode(self, encoded: Encoded) -> Tensor:
        """(code - zero point) * scale, in the dtype that was encoded. Raises `QsimError` for what another encoded."""
        element, dtype = self.coded, working(torch.empty(0, dtype=encoded.dtype)).dtype
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

    def scale_map(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale and the zero point of each element of `x`, in its shape and in the dtype of the arithmetic."""
        blocks, exact, zero = self.measured(x)
        scale = self.rounded_scale(exact).unsqueeze(-1)
        return self.join(scale.expand_as(blocks), x), None if zero is None else self.join(zero.expand_as(blocks), x)

    def round_at(self, x: Tensor, scale: Tensor, zero: Tensor | None, divisor: Tensor | None = None) -> Tensor:
        """`x` rounded under scales and zero points that were found before, given for each element or to broadcast.

        Who rounds many times under one scale gives the `divisor_of` it too.
        """
        return self.units(x, scale, zero, divisor).mul_(scale)

    def static_blocks(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`x` as [B, values], all that shares a static scale over all rows, and how many each stands for."""
        blocks = self.split(working(x))
        counts = self.counts(x, blocks)
        return _over_rows(blocks), None if counts is None else _over_rows(counts)

    def fit(self, values: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Static scales and zero points, [B, 1] each, for values [B, n] of which each stands for `counts`."""
        exact, zero = self._exact(values, counts)
        return self.rounded_scale(exact).unsqueeze(-1), zero

    def scales(self, x: Tensor) -> Scales:
        """Give the scales and zero points of `x`: [A, B] for its A rows of B blocks, or [1, 1] for the tensor."""
        _, exact, zero = self.measured(x)
        scale = self.rounded_scale(exact)
        return Scales(scale.reshape(-1, scale.shape[-1]), None if zero is None else zero.reshape(-1, zero.shape[-2]))

    def quantize_at(self, x: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Quantize `x` with static scales, in its own dtype."""
        if floating(x).numel() == 0:
            return x.clone()
        if (fast := accelerated(self, x, Scales.of(scale, zero), out)) is not None:
            return fast
        blocks = self.split(working(x))
        scale, zero = scale.to(blocks.dtype), None if zero is None else zero.to(blocks.dtype)
        return laid_out_as(x, self.join(self.units(blocks, scale, zero) * scale, x))

    def passes_at(self, x: Tensor, scale: Tensor, zero: Tensor | None, gradient: Gradient = "clipped") -> Tensor:
        """`passes`, or where another gradient does, with static scales."""
        units = self.split(working(x)) / divisor_of(scale)
        return self.join(passing(self.coded, units if zero is None else units + zero, gradient), x)

    def measured(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`x` in blocks [..., B, n], their scales [..., B] before these are rounded, and their zero points."""
        blocks = self.split(working(x))
        return blocks, *self._exact(blocks, self.counts(x, blocks))

    def counts(self, x: Tensor, blocks: Tensor) -> Tensor | None:
        """1 for each value of a block and 0 for each zero that fills it up; None where nothing does."""
        if blocks.numel() == x.numel():
            return None
        return self.split(torch.ones(x.shape[-2:], dtype=blocks.dtype, device=x.device)).expand(blocks.shape)

    def _exact(self, blocks: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scales [..., B] before they are rounded, and zero points [..., B, 1], after `range` has looked."""
        seen = blocks
        if self.symmetric:
            seen = blocks.abs() if self.element.min < 0 else blocks.clamp(min=0)

        def error(low: Tensor, high: Tensor) -> Tensor:
            exact, zero = self.covering(low, high)
            scale = self.rounded_scale(exact).unsqueeze(-1)
            return self.units(blocks, scale, zero) * scale - blocks

        return self.covering(*self.range.range(seen, error, counts))

    def covering(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        element = self.coded
        if not self.symmetric:
            low, high = low.clamp(max=0), high.clamp(min=0)
            steps = element.max - element.min
            exact = divided(high - low, steps)
            apart = divided(high, steps) - divided(low, steps)  # the difference may overflow
            exact = _finite(torch.where(exact.isinf(), apart, exact))
            offset = (low / divisor_of(self.rounded_scale(exact))).round()
            return exact, (element.min - offset).clamp(element.min, element.max).unsqueeze(-1)
        if self.rule == "divide":
            return _finite(divided(high + 0.0, element.reach)), None  # the highest of -0 and 0 may be either
        return power_of_two_scale(high, self.rule, element.max, element.beyond), None

    def _limited(self, exact: Tensor) -> Tensor:
        bare = unscaled_format(self.scale)
        return exact if bare is None else exact.clamp(max=bare.max)

    def rounded_scale(self, exact: Tensor) -> Tensor:
        return exact if self.scale is None else _finite(self.scale.quantize(self._limited(exact)))

    def units(self, blocks: Tensor, scale: Tensor, zero: Tensor | None, divisor: Tensor | None = None) -> Tensor:
        """The blocks in units of their scale, rounded; less the zero point, where there is one."""
        units, element = blocks / (divisor_of(scale) if divisor is None else divisor), self.coded
        if zero is None:
            return element.round(units if element.overflow is None else units.clamp(element.min, element.max))
        return round_to_integer(units, element.min - zero, element.max - zero, element.rounding, element.seed)

    def split(self, x: Tensor) -> Tensor:
        """`x` as [..., blocks, elements of a block]; what a last block lacks is filled up with zeros."""
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
        blocks: Tensor = (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, columns))
        return blocks

    def join(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `split`: blocks back in the shape of the tensor they came from."""
        if self.granularity == "tensor":
            return blocks.reshape(like.shape)
        if isinstance(self.granularity, tuple):
            tiles = blocks.unflatten(-1, self._block(like.shape)).transpose(-2, -3)
            joined: Tensor = tiles.flatten(-4, -3).flatten(-2)
            return joined[..., : like.shape[-2], : like.shape[-1]]
        return blocks.flatten(-2)[..., : like.shape[-1] if like.dim() else 1].reshape(like.shape)

    def blocks_of(self, shape: torch.Size) -> int:
        """How many blocks lie along a row of a tensor of this shape; 1 where all of it shares a scale."""
        return 1 if self.granularity == "tensor" else math.ceil((shape or (1,))[-1] / self._block(shape)[1])

    def _block(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns of a block, never more than there are."""
        length = shape[-1] if shape else 1
        if not isinstance(self.granularity, tuple):
            return 1, max(1, min(self.granularity, length) if isinstance(self.granularity, int) else length)
        if len(shape) < 2:
            raise QsimError(f"{self} shares scales over rows and columns; a tensor of shape {tuple(shape)} has no rows")
        return max(1, min(self.granularity[0], shape[-2])), max(1, min(self.granularity[1], length))

    def bits_per_element(self, shape: torch.Size) -> float | None:
        """The element's width plus scales' and zero points' bits, spread over the elements (32 for a bare scale)."""
        elements, width = math.prod(shape), float(self.element.width)
        if elements == 0 or self.static:  # a static scale is stored once for all data
            return width
        if self.granularity == "tensor":
            scales = torch.Size([1])
        else:
            rows, columns = self._block(shape)
            length, height = (shape or (1,))[-1], shape[-2] if len(shape) > 1 else 1
            scales = torch.Size([*shape[:-2], math.ceil(height / rows), math.ceil(length / columns)])
        each = 32.0 if self.scale is None else self.scale.bits_per_element(scales)
        if each is None:
            return None
        return width + (each + (0 if self.symmetric else width)) * scales.numel() / elements


def _over_rows(blocks: Tensor) -> Tensor:
    """Blocks [..., B, n] as [B, all values there]."""
    return blocks.flatten(0, -3).movedim(-2, 0).flatten(1) if blocks.dim() > 2 else blocks


def _finite(scale: Tensor) -> Tensor:
    return torch.where(scale.isfinite(), scale, torch.nan)


def divisor_of(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is 0: what values are divided by."""
    return torch.where(scale == 0, 1.0, scale)
