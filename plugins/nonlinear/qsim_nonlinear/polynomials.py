"""The polynomials of I-BERT for exp, erf and gelu."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from qsim_nonlinear.approximation import Approximation


class IBert(Approximation):
    """Polynomials of the second degree for exp, erf and gelu, in softmax too.

    exp(x) for x ≤ 0 is L(p) / 2^z with x = p - z ln 2, p in (-ln 2, 0], L(p) = 0.3585 (p + 1.353)² + 0.344. erf(x) is
    sgn(x) (a (min(|x|, -b) + b)² + 1) with a = -0.2888 and b = -1.769, and gelu(x) is x (1 + erf(x / √2)) / 2. The
    polynomials are computed in float32; quantize `input` and `output` for the integers of the paper.

    Source: Kim et al., "I-BERT: Integer-only BERT Quantization" (arXiv 2101.01321), sections 3.4 and 3.5.
    """

    name = "ibert"
    computes = frozenset({"exp", "erf", "gelu", "softmax", "log_softmax"})
    inner: ClassVar[tuple[str, ...]] = ("exp",)

    def approximate(self, kind: str, exact: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if kind == "exp":
            return _exp(x)
        if kind == "erf":
            return _erf(x)
        return torch.where(x.isinf(), exact(x), x * (1 + _erf(x / math.sqrt(2))) / 2)


def _exp(x: Tensor) -> Tensor:
    """Compute exp of numbers that are not positive; a positive number has the exponential of its whole part too."""
    near = x.clamp(min=-2000)  # far below the smallest number
    halvings = torch.floor(-near / math.log(2))
    p = near + halvings * math.log(2)
    found = torch.ldexp(0.3585 * (p + 1.353).square() + 0.344, -halvings.nan_to_num().to(torch.int32))
    return torch.where(x.isinf(), torch.exp(x), found)


def _erf(x: Tensor) -> Tensor:
    return x.sign() * (-0.2888 * (x.abs().clamp(max=1.769) - 1.769).square() + 1) + 0 * x.nan_to_num(posinf=0, neginf=0)
