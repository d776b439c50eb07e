"""The gradients of rounding: the choices of a scheme, and the values at which each is 1.

Rounding has no useful derivative. The derivative of another function takes its place, under the tensor's scales:

    clipped    clamp(x, lowest - half a step, highest + half a step): 1 for every value that is only rounded
    piecewise  clamp(x, lowest, highest), the piecewise linear gradient of TensorRT's quantization toolkit
    identity   x (Bengio et al., arXiv 1308.3432, section 4)
    lsq        as piecewise for x; the scales are parameters with their own gradient, in a plugin

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
    """Tell where the gradient is 1 and not 0, as booleans in the shape of `units`.

    `units` are values divided by their scale, plus their zero point. At the lowest and the highest value of `element`,
    `piecewise` gives 1, and `lsq` gives 0 as in its paper. NaN gives 1 for `identity` only.
    """
    if gradient == "clipped":
        return element.passes(units)
    if gradient == "identity":
        return torch.ones_like(units, dtype=torch.bool)
    if gradient == "lsq":
        return (units > element.min) & (units < element.max)
    return (units >= element.min) & (units <= element.max)
