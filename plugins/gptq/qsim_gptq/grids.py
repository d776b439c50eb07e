"""A quantizer's grid, column by column: the values that each column of a matrix may take, and their scales."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qsim_core.formats.accelerator import compiled
from qsim_core.formats.quantizer import Quantizer
from qsim_core.formats.random_bits import at
from qsim_core.formats.rounding import working
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme, divisor_of

SOURCE = Path(__file__).parent / "feedback.cpp"
"""The loop over a run of columns, in C++."""


Known = tuple[Scales | None, Scales | None]
"""The scales of a matrix, and the scales of these; None: there are none."""


@dataclass(frozen=True)
class ColumnGrid:
    """The values that the columns of one matrix [N, K] may take."""

    quantizer: Quantizer
    dtype: torch.dtype
    """The dtype of the weight. Rounded values are rounded to it too."""
    place: str | None = None
    """The name of the random stream of stochastic rounding, together with the column; None: no random numbers."""
    scale: Tensor | None = None
    """The scales [groups, N] of each group of columns that share them; None: the quantizer has no scales."""
    zero: Tensor | None = None
    """The zero points [groups, N]; None: the quantizer has no zero points."""
    divisor: Tensor | None = field(init=False)
    """The divisors that belong to the scales, computed once for all columns of a group."""
    groups: Sequence[int] = ()
    """The group of each column."""
    refits: int = 0
    """The number of columns that share scales fitted when they are reached; 0: the scales are fixed."""
    second: Scales | None = None
    """The fixed scales and zero points [N, groups] of the scales; None: scales are not themselves scaled."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "divisor", None if self.scale is None else divisor_of(self.scale))

    @property
    def known(self) -> Known:
        """The scales and zero points of each row and group, [N, groups], and the scales of these scales."""
        if self.scale is None:
            return None, None
        scales = Scales(self.scale.T.contiguous(), None if self.zero is None else self.zero.T.contiguous())
        return scales, self.second

    def in_order(self, order: Tensor | None) -> ColumnGrid:
        """Return the same grid for columns in another order."""
        return (
            self if order is None or not self.groups else replace(self, groups=[self.groups[i] for i in order.tolist()])
        )

    def round(self, column: int, values: Tensor) -> Tensor:
        """Round one column [N] (float32 or float64) to its grid."""
        with self._drawing(column):
            if self.scale is None or self.divisor is None:
                rounded = self.quantizer.quantize(values)
            else:
                group = self.groups[column]
                zero = None if self.zero is None else self.zero[group]
                scheme = cast(Scheme, self.quantizer)
                rounded = scheme.round_at(values, self.scale[group], zero, self.divisor[group])
        return rounded if rounded.dtype == self.dtype else rounded.to(self.dtype).to(values.dtype)

    def round_run(
        self, first: int, start: Tensor, moved: Tensor, change: Tensor, rounded: Tensor, shares: Tensor
    ) -> bool:
        """Round the columns [n, N] from `first` on with the native kernels. Return false if these cannot do it."""
        if self.scale is None or self.place is not None or self.dtype != torch.float32:
            return False
        kernel = compiled(SOURCE, 4 * moved.numel())
        steps = None if kernel is None else kernel.rule(cast(Scheme, self.quantizer), moved)
        if steps is None:
            return False
        groups = torch.tensor(self.groups[first : first + len(moved)])
        given = [c_void_p(t.data_ptr()) for t in (start, moved, change, rounded, shares)]
        zeros = None if self.zero is None else c_void_p(self.zero.data_ptr())
        held = c_void_p(self.scale.data_ptr()), zeros, c_void_p(groups.data_ptr())
        sizes = [c_int64(size) for size in (*shares.stride(), *start.shape)]
        kernel.functions.feed_back(*given, *sizes, *held, kernel.grid(steps), c_int32(torch.get_num_threads()))
        return True

    def fit(self, first: int, current: Tensor) -> None:
        """Compute the scales of the group of columns from `first` on, from their compensated values [n, N]."""
        scheme, group = cast(Scheme, self.quantizer), self.groups[first]
        if self.second is not None:
            held, scale = cast(Scheme, scheme.scale), self.second.scale[:, group : group + 1]
            zero = None if self.second.zero is None else self.second.zero[:, group : group + 1]
            scheme = scheme.replace(scale=lambda exact: held.round_at(exact, scale, zero))
        with self._drawing(first):
            scales, zeros = scheme.scale_map(current.T.contiguous())
        found = scales, zeros, divisor_of(scales)
        for stored, new in zip((self.scale, self.zero, self.divisor), found, strict=True):
            if stored is not None and new is not None:
                stored[group] = new[:, 0]

    def _drawing(self, column: int) -> AbstractContextManager[Any]:
        return nullcontext() if self.place is None else at(self.place, column)


def grids(quantizer: Quantizer, rows: Tensor, count: int, refit: bool, place: str) -> list[ColumnGrid]:
    """Return the grids of the `count` matrices that a weight holds, whose `rows` [..., K] are quantized together.

    The quantizer computes the scales from `rows`. With `refit`, scales shared by n elements along a row are computed
    again for each group when it is reached. If such a scale is itself scaled, the scales of the scales stay fixed.
    """
    places = [f"{place}:{index}" if quantizer.draws else None for index in range(count)]
    if not isinstance(quantizer, Scheme):
        return [ColumnGrid(quantizer, rows.dtype, drawn) for drawn in places]
    width, shared = rows.shape[-1], quantizer.granularity
    shared = shared[1] if isinstance(shared, tuple) else shared
    n = width if isinstance(shared, str) else min(shared, width)
    refits = n if isinstance(quantizer.granularity, int) and refit and why_scales_are_fixed(quantizer) is None else 0
    if refits:
        scales = torch.empty_like(working(rows)[..., ::n])
        zeros = None if quantizer.symmetric else torch.empty_like(scales)
    else:
        scales, zeros = quantizer.scale_map(rows)
        scales, zeros = scales[..., ::n], None if zeros is None else zeros[..., ::n]
    second = quantizer.scales_of_scales(rows)
    if second is not None:
        second = Scales(second.scale[..., ::n], None if second.zero is None else second.zero[..., ::n])

    def of(index: int) -> ColumnGrid:
        def own(t: Tensor) -> Tensor:
            return t.reshape(count, -1, t.shape[-1])[index]

        return ColumnGrid(
            quantizer,
            rows.dtype,
            places[index],
            scale=own(scales).T.contiguous(),
            zero=None if zeros is None else own(zeros).T.contiguous(),
            groups=[column // n for column in range(width)],
            refits=refits,
            second=None
            if second is None
            else Scales(own(second.scale), None if second.zero is None else own(second.zero)),
        )

    return [of(index) for index in range(count)]


def why_not_by_column(quantizer: Quantizer) -> str | None:
    """Return the reason why a quantizer cannot round one column at a time; None if it can."""
    if isinstance(quantizer, Scheme) or quantizer.granularity == "element":
        return None
    return f"{quantizer} is not a scheme, and does not declare that it rounds each element by itself"


def why_scales_are_fixed(quantizer: Quantizer) -> str | None:
    """Return the reason why the scales of blocks cannot be fitted one by one; None if they can."""
    scale = quantizer.scale if isinstance(quantizer, Scheme) else None
    if scale is None or isinstance(scale, Scheme) or scale.granularity == "element":
        return None
    return f"{scale} may round the scales of several blocks together"
