"""Block formats with shared scales: `mx(element, n)`, the OCP MX names, NVFP4, MSFP, DeepSeek-V3's tiles."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from qsim_core import Calibrator, Format, Preset, Quantizer, Scheme, hookimpl
from qsim_core.formats.rounding import ScaleRule
from qsim_core.quantizers.calibrators import ErrorOf


class MX(Scheme):
    """Blocks of 32 along the reduction axis share a scale that is a power of two, stored as E8M0.

    Source: OCP Microscaling Formats (MX) v1.0, sections 5 and 6.3. The scale is 2^(floor(log2 max|x|) - emax), where
    emax is the exponent of the element format's largest value. So the largest elements of a block may saturate. `rule`
    names other rules in use: ceil, even and rceil. `rceil` is the smallest power of two that saturates no value, as in
    NVIDIA's hardware. If a block has NaN or ±Inf, all its values become NaN, and its scale is the NaN of E8M0.
    """

    name = "mx"
    element: Format = Field("e4m3", description="the number format of the scaled values")  # type: ignore[assignment]
    n: PositiveInt = Field(32, description="elements that share a scale; the last block may be short")
    scale: Quantizer | None = Field("e8m0", description="the format that rounds the scales")  # type: ignore[assignment]
    rule: ScaleRule = Field("floor", description="rule that makes a scale of a range: floor, ceil, even, rceil, divide")

    @property
    def granularity(self) -> int:
        return self.n


class FourOverSix(Calibrator):
    """Covers the whole range of a block, or 1.5 times as much, if the sum of squared errors is smaller.

    The largest magnitude of a block becomes 6 or 4 in E2M1: 4 where 6 would leave the values near 5 without a
    neighbour. The quantizer of the scales needs room for 1.5 times the largest scale; `nvfp4_adaptive` has it.
    Source: four-over-six, arXiv 2512.02010.
    """

    name = "four_over_six"

    def range(self, blocks: Tensor, error: ErrorOf, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = self.whole(blocks)

        def squared(share: float) -> Tensor:
            squares = error(share * low, share * high).square()
            return (squares if counts is None else squares * counts).sum(-1)

        share = torch.where(squared(1.5) < squared(1.0), 1.5, 1.0)
        return share * low, share * high


OCP = [
    Preset("mxfp8_e4m3", "mx(e4m3)", "OCP MXFP8, E4M3"),
    Preset("mxfp8_e5m2", "mx(e5m2)", "OCP MXFP8, E5M2"),
    Preset("mxfp6_e3m2", "mx(e3m2)", "OCP MXFP6, E3M2"),
    Preset("mxfp6_e2m3", "mx(e2m3)", "OCP MXFP6, E2M3"),
    Preset("mxfp4", "mx(e2m1)", "OCP MXFP4"),
    Preset("mxint8", "mx(int8(fraction=6))", "OCP MXINT8: multiples of 1/64 below 2"),
]
MSFP = [
    Preset(
        f"msfp{8 + bits}",
        f"mx(int{bits}, n=16)",
        f"Microsoft Floating Point: 16 integers of {bits} bits share an exponent (NeurIPS 2020)",
    )
    for bits in range(3, 9)
]
OTHERS = [
    Preset(
        "nvfp4",
        "scaled(e2m1, block=16, scale=scaled(e4m3))",
        "NVIDIA NVFP4: blocks of 16, E4M3 scales, one float32 scale for the tensor",
    ),
    Preset(
        "nvfp4_static",
        "scaled(e2m1, block=16, scale=scaled(e4m3, static=true))",
        "NVFP4 for activations as it is deployed: the tensor's scale is found in calibration data",
    ),
    Preset(
        "nvfp4_adaptive",
        "scaled(e2m1, block=16, scale=scaled(e4m3(full_scale=256)), range=four_over_six)",
        "NVFP4 with the better of two scales for each block: four-over-six, arXiv 2512.02010",
    ),
    Preset("deepseek_weights", "block(e4m3, n=[128, 128])", "DeepSeek-V3, arXiv 2412.19437, 3.3.2: tiles of 128 x 128"),
    Preset("deepseek_activations", "block(e4m3, n=128)", "DeepSeek-V3, arXiv 2412.19437, 3.3.2: tiles of 1 x 128"),
]


@hookimpl
def qsim_quantizers() -> list[type[Quantizer] | Preset]:
    return [MX, *OCP, *MSFP, *OTHERS]


@hookimpl
def qsim_calibrators() -> list[type[Calibrator]]:
    return [FourOverSix]
