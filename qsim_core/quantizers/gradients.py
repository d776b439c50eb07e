"""The gradient of rounding: which one a scheme takes, and where it passes.

Rounding has no useful derivative, so that of a smooth surrogate stands in its place, at the scales that the tensor has:

    clipped    clamp(x, lowest - half a step, highest + half a step): whatever rounding alone moves passes
    piecewise  clamp(x, lowest, highest), the piecewise linear one of TensorRT's quantization toolkit
    identity   x (Bengio et al., arXiv 1308.3432, section 4)
    lsq        piecewise for x, and the scales are parameters with a gradient of their own (see `learned_steps`)

Scales that are found anew in every tensor count as constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qsim_core.formats.format import Format

Gradient = Literal["clipped", "piecewise", "identity", "lsq"]


def passing(element: Format, units: Tensor, gradient: Gradient) -> Tensor:
    """Where a gradient passes, for values in units of their scale (and moved by their zero point); as booleans.

    At the lowest and the highest value itself piecewise passes and lsq, as its paper has it, does not. NaN passes
    under identity only.
    """
    if gradient == "clipped":
        return element.passes(units)
    if gradient == "identity":
        return torch.ones_like(units, dtype=torch.bool)
    if gradient == "lsq":
        return (units > element.min) & (units < element.max)
    return (units >= element.min) & (units <= element.max)
