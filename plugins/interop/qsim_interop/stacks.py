"""Quantizers of deployed stacks: the bits that llama.cpp and compressed-tensors make of a weight.

They differ from the formats of the same name in which number is rounded first, and where a tie goes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qsim_core import Preset, Quantizer
from qsim_core.formats.quantizer import Granularity, laid_out_as
from qsim_core.formats.rounding import working

TINY = torch.finfo(torch.float32).tiny
E4M3, E2M1 = 448.0, 6.0
"""The largest values of both formats."""
SMALLEST_SCALE = 0.125
"""The block scale that compressed-tensors takes in place of zero."""


class Stack(Quantizer):
    """Rounds blocks along the reduction axis as a stack does; zeros fill up a short last block."""

    n: ClassVar[int]
    bits: ClassVar[float]
    """Bits of an element with its share of the scales."""

    def quantize(self, x: Tensor) -> Tensor:
        values = torch.atleast_1d(working(x).float())
        length = values.shape[-1]
        blocks = F.pad(values, (0, -length % self.n)).unflatten(-1, (-1, self.n))
        rounded = self.rounded(blocks).flatten(-2)[..., :length] if x.numel() else values
        return laid_out_as(x, rounded.reshape(x.shape).to(x.dtype))

    @abstractmethod
    def rounded(self, blocks: Tensor) -> Tensor:
        """Round blocks [..., n] in float32."""

    def bits_per_element(self, shape: torch.Size) -> float:
        return self.bits

    @property
    def granularity(self) -> Granularity:
        return self.n


class LlamaCppQ4(Stack):
    """Rounds as llama.cpp makes Q4_0: 32 codes from -8 to 7, of which -8 is the value with the largest magnitude.

    The scale d is that value over -8, and may be negative. Codes are trunc(x / d + 8.5) - 8, so a tie goes up; they are
    found with d in float32, and multiplied by d in float16. A block with NaN or Inf becomes NaN; so does one of which d
    overflows float16, or becomes Inf.

    Source: gguf 0.19, `gguf.quants.Q4_0`.
    """

    name = "llama_cpp_q4_0"
    n = 32
    bits = 4.5

    def rounded(self, blocks: Tensor) -> Tensor:
        places = blocks.abs().argmax(-1, keepdim=True)
        scale = blocks.gather(-1, places) / -8
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        codes = (blocks * inverse + 8.5).trunc().clamp(0, 15) - 8
        return codes * scale.half().float()

    @property
    def by_rows(self) -> bool:
        return True


class LlamaCppQ8(Stack):
    """Rounds as llama.cpp makes Q8_0: 32 codes from -127 to 127, ties away from zero.

    Codes are found with the scale max|x| / 127 in float32, and multiplied by it in float16. A block with NaN or Inf
    becomes NaN.

    Source: gguf 0.19, `gguf.quants.Q8_0`.
    """

    name = "llama_cpp_q8_0"
    n = 32
    bits = 8.5

    def rounded(self, blocks: Tensor) -> Tensor:
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        units = blocks * torch.where(scale == 0, 0.0, 1 / scale)
        whole = units.abs().floor()
        codes = units.sign() * (whole + (2 * (units.abs() - whole)).floor())
        return codes * scale.half().float()

    @property
    def by_rows(self) -> bool:
        return True


class VllmNvfp4(Stack):
    """Rounds as compressed-tensors makes the NVFP4 that vLLM runs: 16 values of E2M1, ties to even, saturating.

    The global scale g is 448 * 6 / max|x| in float32. A block's scale is max|x| g / 6 in E4M3, or 0.125 where that is
    zero. Values are divided and multiplied by that scale / g in float32. `nvfp4` multiplies by a global scale instead,
    and differs in the last bits of a value. A block with NaN becomes NaN, and then g is 1, as for Inf.

    Source: compressed-tensors 0.20, `generate_gparam`, `calculate_qparams` and `fake_quantize`.
    """

    name = "vllm_nvfp4"
    n = 16
    bits = 4.5

    def rounded(self, blocks: Tensor) -> Tensor:
        highest = blocks.abs().amax(-1, keepdim=True)
        whole = (E4M3 * E2M1 / highest.amax().clamp(min=TINY)).nan_to_num(1.0, 1.0, 1.0)
        scale = (highest / E2M1 * whole).clamp(max=E4M3).to(torch.float8_e4m3fn).float()
        scale = torch.where(scale == 0, SMALLEST_SCALE, scale) / whole
        return _to_e2m1(blocks / scale) * scale

    @property
    def sharing(self) -> frozenset[Granularity]:
        return frozenset({self.n, "tensor"})


def _to_e2m1(x: Tensor) -> Tensor:
    """Round to the values of E2M1, ties to even, saturating: the spacing is 0.5 below 2, then 1, then 2."""
    spacing = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return (x / spacing).round().mul(spacing).clamp(-E2M1, E2M1)


PRESETS = (
    Preset("vllm_fp8", "channel(e4m3)", "weights of vLLM's FP8: one float32 scale for each output channel"),
    Preset("vllm_int8", "channel(int(8, narrow=false, convention=gptq))", "weights of compressed-tensors' W8A8"),
)
STACKS: tuple[type[Quantizer] | Preset, ...] = (LlamaCppQ4, LlamaCppQ8, VllmNvfp4, *PRESETS)
