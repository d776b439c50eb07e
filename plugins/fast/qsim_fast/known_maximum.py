"""A scheme on part of a tensor, where the highest magnitude of the whole tensor is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qsim_core.formats.quantizer import SiteQuantizer, laid_out_as
from qsim_core.formats.rounding import working
from qsim_core.quantizers.scheme import Scheme
from qsim_fast import quantizing


@dataclass(frozen=True, eq=False)
class KnownMaximum(SiteQuantizer):
    """A scheme whose one shared scale follows from the highest magnitude of a tensor, which is known beforehand."""

    scheme: Scheme
    highest: Tensor
    """A number."""

    @staticmethod
    def fits(scheme: Any) -> bool:
        """Tell if one scale, of the whole tensor or of its scales, is all that depends on the other parts."""
        if not isinstance(scheme, Scheme) or scheme.static or scheme.learns or not scheme.symmetric:
            return False
        if not quantizing.plain(scheme):
            return False
        if scheme.granularity == "tensor":
            return scheme.scale is None or scheme.scale.granularity == "element"
        return quantizing.above(scheme) is not None

    def quantize(self, x: Tensor) -> Tensor:
        """Quantize this part as `scheme.quantize` does in the whole tensor."""
        return self.quantize_into(x, None)

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        scheme, highest = self.scheme, self.highest.to(working(x).dtype)
        if scheme.granularity == "tensor":
            exact, _ = scheme.covering(-highest, highest)
            return scheme.quantize_at(x, scheme.rounded_scale(exact).view(1, 1), None, out)
        above = quantizing.above(scheme)
        assert above is not None
        second = quantizing.scale_of_scales(scheme, highest)
        if (fast := quantizing.quantize(scheme, x, second=second, result=out)) is not None:
            return fast
        blocks, own, _ = scheme.measured(x)
        scale = above.quantize_at(own, second.view(1, 1), None).unsqueeze(-1)
        return laid_out_as(x, scheme.join(scheme.round_at(blocks, scale, None), x))
