"""ARCQuant: `arcquant()` multiplies the largest channels of activations twice: as rounded, and their rounding error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from qsim_branches.matrices import matrices
from qsim_core import Transform
from qsim_core.formats.quantizer import Around, SiteQuantizer
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context


@dataclass(frozen=True, eq=False)
class Order:
    """Puts the channels of the last axis into another order."""

    places: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x[..., self.places.to(x.device)]

    def __str__(self) -> str:
        return "an order by their largest values"


@dataclass(frozen=True, eq=False)
class Augmented(Around):
    """Q(x), and Q of the rounding error of the last `channels`, under the same scales of scales.

    Their sum is what the weight is multiplied by, as it repeats its own columns.
    """

    quantizer: SiteQuantizer
    channels: int

    @property
    def inner(self) -> SiteQuantizer:
        return self.quantizer

    def quantize(self, x: Tensor) -> Tensor:
        """Compute Q(x), and add Q(x - Q(x)) to the last channels."""
        error = (x - self.quantizer.quantize(x))[..., -self.channels :]
        both = self.quantizer.quantize(torch.cat([x, error], -1))
        rounded = both[..., : x.shape[-1]].clone()
        rounded[..., -self.channels :] += both[..., x.shape[-1] :]
        return rounded

    def passes(self, x: Tensor) -> Tensor | None:
        return self.quantizer.passes(x)

    def bits_per_element(self, shape: torch.Size) -> float | None:
        longer = torch.Size([*shape[:-1], shape[-1] + self.channels])
        bits = self.quantizer.bits_per_element(longer)
        return None if bits is None else bits * longer[-1] / shape[-1]

    @property
    def rounds_to(self) -> None:
        """None: sums of two values of the format are in no format."""
        return None

    @property
    def appended(self) -> int:
        return self.channels

    def __str__(self) -> str:
        return f"{self.quantizer} with {self.channels} residual channels"


class ARCQuant(Transform):
    """Orders the channels of inputs by their largest values, and appends the rounding errors of the last S of them.

        [Q(x), Q(e)] [Q(W), Q(W)_S]ᵀ        e = (x - Q(x))_S

    S is a share of the channels, rounded up to a multiple: that of the values which are beyond `threshold` times the
    largest of their token. Source: ARCQuant (arXiv 2601.07475), as in actypedef/ARCQuant.
    The README lists every difference.
    """

    name = "arcquant"
    threshold: float = Field(0.125, ge=0, le=1, description="of the largest value of a token")
    multiple: int | None = Field(None, ge=1, description="of which S is one; none: a block of the input's format")
    channels: int | None = Field(None, ge=1, description="S, if it is not to depend on the threshold")
    rows: int = Field(8192, ge=1, description="of inputs of each weight that are looked at")

    def apply(self, model: nn.Module, context: Context) -> None:
        """Reorder every weight whose input is quantized by blocks. Raises `DataError` without calibration data."""
        for matrix in matrices(context, self.rows, self._why_not):
            with context.timed() as seconds:
                x, block = matrix.x, _block(matrix.site) or 1
                count = self._count(x, math.lcm(block, self.multiple or 1))
                if not count:
                    context.report(matrix.name, note="left alone: all its inputs are 0")
                    continue
                of_input = matrix.site.quantizer("input")
                appended = Augmented(of_input, count)
                order = Order(x.abs().amax(0).argsort(stable=True))
                matrix.change(model, order)
                matrix.map_input(order)
                matrix.site.fixed["input"] = appended
                size = float(x.double().norm())
                before = float((of_input.quantize(x) - x).double().norm()) / size
                x = order(x)
                after = float((appended.quantize(x) - x).double().norm()) / size
            context.report(
                matrix.name,
                before=before,
                after=after,
                measure="relative error of the inputs",
                seconds=seconds(),
                note=f"{count} of {x.shape[-1]} channels twice",
            )

    def _count(self, x: Tensor, multiple: int) -> int:
        """The number of channels that are multiplied twice, for inputs [T, K]."""
        length, wanted = x.shape[-1], self.channels
        if wanted is None:
            large = x.abs() > self.threshold * x.abs().amax(-1, keepdim=True)
            wanted = math.ceil(length * int(large.sum()) / large.numel())
        return min(-(-wanted // multiple) * multiple, length)

    def _why_not(self, site: Site, length: int) -> str | None:
        planned = site.planned("input")
        if planned is None:
            return "its input is not quantized"
        if planned.needs_held_scales("input"):
            return f"{planned} has static scales, which are found after all transforms"
        block = _block(site)
        if block is None:
            return f"{planned} has no blocks along the rows: under the scale of its row an error is rounded to 0"
        return f"blocks of {block} do not divide its {length} inputs" if length % block else None


def _block(site: Site) -> int | None:
    """The elements of an input that share a scale; None: there are no blocks along its rows."""
    planned = site.planned("input")
    found = None if planned is None else planned.granularity
    found = found[1] if isinstance(found, tuple) else found
    return found if isinstance(found, int) else None
