"""Quantize a part of a tensor as it would be quantized within the whole, whose highest magnitude is known."""

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
    """A scheme with one scale for the tensor, or for all its scales, and the highest magnitude that decides it."""

    scheme: Scheme
    highest: Tensor
    """The highest magnitude of the whole tensor, a 0-d tensor."""

    @staticmethod
    def supports(scheme: Any) -> bool:
        """Tell if a value depends on the other parts of a tensor through the highest magnitude alone."""
        if not isinstance(scheme, Scheme) or scheme.static or scheme.learns or not scheme.symmetric:
            return False
        if not quantizing.supported(scheme):
            return False
        if scheme.granularity == "tensor":
            return scheme.scale is None or scheme.scale.granularity == "element"
        return quantizing.scheme_of_scales(scheme) is not None

    def quantize(self, x: Tensor) -> Tensor:
        """Quantize a part as `scheme.quantize` does within the whole tensor."""
        return self.quantize_into(x, None)

    def quantize_into(self, x: Tensor, out: Tensor | None) -> Tensor:
        scheme, highest = self.scheme, self.highest.to(working(x).dtype)
        if scheme.granularity == "tensor":
            exact, _ = scheme.covering(-highest, highest)
            return scheme.quantize_at(x, scheme.rounded_scale(exact).view(1, 1), None, out)
        scale_scheme = quantizing.scheme_of_scales(scheme)
        assert scale_scheme is not None
        tensor_scale = quantizing.tensor_scale_of(scheme, highest)
        if (fast := quantizing.quantize(scheme, x, tensor_scale=tensor_scale, result=out)) is not None:
            return fast
        blocks, own, *_ = scheme.measured(x)
        scale = scale_scheme.quantize_at(own, tensor_scale.view(1, 1), None).unsqueeze(-1)
        return laid_out_as(x, scheme.join(scheme.round_at(blocks, scale, None), x))
