"""GPTQ, GPTAQ and Qronos: each rounds a weight so that its products with calibration data change least."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from qsim_core import Transform, hookimpl
from qsim_gptq.error_feedback import ErrorFeedback
from qsim_gptq.factors import Factor, factorize, gptaq, qronos
from qsim_gptq.hessians import Moments


class GPTQ(ErrorFeedback):
    """Rounds a weight column by column to its quantizer's grid, and compensates each error in the remaining columns.

    It works with any scheme, and with any format without a scale. The scales of rows, tiles and tensors are those of
    the original weight. The scales of n elements along a row are computed when the first of these columns is rounded,
    unless `static_groups` or `act_order` is set. The inputs of a block of the model are the outputs of the blocks
    before it, which are already quantized; activations are quantized if `activations` is set. Source: arXiv 2210.17323,
    algorithm 1, as implemented by IST-DASLab/gptq. The README lists every difference.
    """

    name = "gptq"

    def factor(self, moments: Moments) -> Factor:
        return factorize(moments.hessian, self.percdamp, self.act_order)


class GPTAQ(ErrorFeedback):
    """GPTQ that also compensates what a layer's inputs have drifted from those of the original model.

    The drift of a column's input changes the output. The later columns make up for a share `alpha` of that change, as
    far as they can. Source: arXiv 2504.02692, as implemented by Intelligent-Computing-Lab-Yale/GPTAQ. The README has
    the formula and every difference.
    """

    name = "gptaq"
    paired: ClassVar[bool] = True
    percdamp: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="added to the Hessian's diagonal, as a share of its mean"
    )
    true_sequential: bool = Field(
        True, description="run a block again after each set of weights with the same input, not once for all weights"
    )
    activations: bool = Field(True, description="quantize activations too while the inputs are observed")
    alpha: float = Field(0.25, ge=0, allow_inf_nan=False, description="share of the drift that is compensated")

    def factor(self, moments: Moments) -> Factor:
        if moments.drift is None:
            return factorize(moments.hessian, self.percdamp, self.act_order)
        return gptaq(moments.hessian, moments.drift, self.percdamp, self.act_order, self.alpha)


class Qronos(ErrorFeedback):
    """Rounds a weight so that it gives the original model's outputs for the inputs that it will really get.

    The first column is rounded to where it corrects most. The others then become the columns with the least error
    beside it, from which GPTQ goes on. Source: arXiv 2505.11695, as implemented by Xilinx/brevitas. The README has the
    formula and every difference.
    """

    name = "qronos"
    paired: ClassVar[bool] = True
    percdamp: float = Field(
        1e-6,
        ge=0,
        allow_inf_nan=False,
        description="added to the Hessian's diagonal, as a share of its largest eigenvalue",
    )
    true_sequential: bool = Field(
        True, description="run a block again after each set of weights with the same input, not once for all weights"
    )
    activations: bool = Field(True, description="quantize activations too while the inputs are observed")

    def factor(self, moments: Moments) -> Factor:
        drift = moments.hessian.new_zeros(()).expand_as(moments.hessian) if moments.drift is None else moments.drift
        return qronos(moments.hessian, drift, self.percdamp, self.act_order)


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [GPTQ, GPTAQ, Qronos]
