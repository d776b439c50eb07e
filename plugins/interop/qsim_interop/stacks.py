"""Quantizers of deployed stacks: the bits that llama.cpp and compressed-tensors make of a weight.

They differ from the formats of the same name in which number is rounded first, and where a tie goes.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qsim_core import Encoded, Format, Preset, Quantizer, Scheme, parse
from qsim_core.formats.quantizer import Granularity, laid_out_as
from qsim_core.formats.rounding import working

TINY = torch.finfo(torch.float32).tiny
E4M3, E2M1 = 448.0, 6.0
"""The largest values of both formats."""
SMALLEST_SCALE = 0.125
"""The block scale that compressed-tensors takes in place of zero."""


class BlockScales(NamedTuple):
    """The scales of blocks in the values of their format, and the one that the whole tensor has, or None."""

    blocks: Tensor
    whole: Tensor | None = None


class Stack(Quantizer):
    """Rounds blocks along the reduction axis as a stack does; zeros fill up a short last block."""

    n: ClassVar[int]
    bits: ClassVar[float]
    """Bits of an element with its share of the scales."""
    form: ClassVar[str]
    """The scheme whose codes and scales are stored. Its own values of a tensor may be others."""

    def quantize(self, x: Tensor) -> Tensor:
        values = torch.atleast_1d(working(x).float())
        if x.numel():
            units, scales = self.units(_in_blocks(values, self.n))
            values = _joined(units * self.factors(scales), x)
        return laid_out_as(x, values.reshape(x.shape).to(x.dtype))

    @abstractmethod
    def units(self, blocks: Tensor) -> tuple[Tensor, BlockScales]:
        """The values of the codes of blocks [..., n] in float32, and their scales [..., 1]."""

    def factors(self, scales: BlockScales) -> Tensor:
        """The factors by which the values of codes are multiplied."""
        return scales.blocks

    @functools.cached_property
    def stored_as(self) -> Scheme:
        """The scheme of `form`."""
        found: Scheme = parse(self.form)
        return found

    def encode(self, x: Tensor) -> Encoded:
        form, element = self.stored_as, self.stored_as.element
        if not x.numel():
            return form.encode(x)
        units, scales = self.units(_in_blocks(torch.atleast_1d(working(x).float()), self.n))
        broken = units.isnan().any(-1, keepdim=True)
        units, blocks = torch.where(broken, element.max, units), torch.where(broken, torch.nan, scales.blocks)
        inner = self._inner
        stored = Encoded(inner.to_codes(blocks.squeeze(-1)), inner.width, torch.float32, scales.whole)
        return Encoded(_joined(element.to_codes(units), x), element.width, x.dtype, stored)

    def decode(self, encoded: Encoded) -> Tensor:
        form = self.stored_as
        if encoded.codes.numel() == 0:
            return form.decode(encoded)
        units = form.element.from_codes(_in_blocks(torch.atleast_1d(encoded.codes), self.n))
        return _joined(units * self.scales_of(encoded).unsqueeze(-1), encoded.codes).to(encoded.dtype)

    def scales_of(self, encoded: Encoded) -> Tensor:
        """The scales [..., blocks] of an encoded tensor, in float32."""
        scales: Any = encoded.scales
        return self.factors(BlockScales(self._inner.from_codes(scales.codes), scales.scales))

    @property
    def _inner(self) -> Format:
        """The number format of the scales."""
        assert self.stored_as.scale is not None
        found: Format = self.stored_as.scale.rounds_to
        return found

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
    form = "block(int(4, narrow=false), 32, scale=fp16)"

    def units(self, blocks: Tensor) -> tuple[Tensor, BlockScales]:
        places = blocks.abs().argmax(-1, keepdim=True)
        scale = blocks.gather(-1, places) / -8
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        codes = (blocks * inverse + 8.5).trunc().clamp(0, 15) - 8
        return codes, BlockScales(scale.half().float())

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
    form = "block(int8, 32, scale=fp16)"

    def units(self, blocks: Tensor) -> tuple[Tensor, BlockScales]:
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        units = blocks * torch.where(scale == 0, 0.0, 1 / scale)
        whole = units.abs().floor()
        codes = units.sign() * (whole + (2 * (units.abs() - whole)).floor())
        return codes, BlockScales(scale.half().float())

    @property
    def by_rows(self) -> bool:
        return True


class VllmNvfp4(Stack):
    """Rounds as compressed-tensors makes the NVFP4 that vLLM runs: 16 values of E2M1, ties to even, saturating.

    The global scale g is 448 * 6 / max|x| in float32. A block's scale is max|x| g / 6 in E4M3, or 0.125 where that is
    zero. Values are divided and multiplied by that scale / g in float32. `nvfp4` multiplies by a global scale instead,
    and differs in the last bits of a value. A block with NaN becomes NaN, and then g is 1, as for Inf. With `highest`
    it takes the place of max|x| in g, as for layers that a server fuses.

    Source: compressed-tensors 0.20, `generate_gparam`, `calculate_qparams` and `fake_quantize`.
    """

    name = "vllm_nvfp4"
    n = 16
    bits = 4.5
    form = "scaled(e2m1, 16, scale=scaled(e4m3))"
    highest: float | None = Field(
        None, gt=0, description="the largest magnitude of all tensors that share g; none: max|x|"
    )

    def units(self, blocks: Tensor) -> tuple[Tensor, BlockScales]:
        highest = blocks.abs().amax(-1, keepdim=True)
        of_all = highest.amax() if self.highest is None else highest.new_tensor(self.highest)
        whole = (E4M3 * E2M1 / of_all.clamp(min=TINY)).nan_to_num(1.0, 1.0, 1.0)
        scale = (highest / E2M1 * whole).clamp(max=E4M3).to(torch.float8_e4m3fn).float()
        scales = BlockScales(torch.where(scale == 0, SMALLEST_SCALE, scale), whole.reshape(1))
        return _to_e2m1(blocks / self.factors(scales)), scales

    def factors(self, scales: BlockScales) -> Tensor:
        assert scales.whole is not None
        return scales.blocks / scales.whole

    def global_scale(self, x: Tensor) -> float:
        """The number that g is computed from: max|x|."""
        return float(working(x).float().abs().max())

    def at_global_scale(self, scale: float) -> VllmNvfp4:
        """The same quantizer with this number in place of the tensor's own."""
        return self.replace(highest=scale)

    @property
    def sharing(self) -> frozenset[Granularity]:
        return frozenset({self.n, "tensor"} if self.highest is None else {self.n})


def _in_blocks(values: Tensor, n: int) -> Tensor:
    """Split rows into blocks [..., n]; zeros fill up a short last block."""
    blocks: Tensor = F.pad(values, (0, -values.shape[-1] % n)).unflatten(-1, (-1, n))
    return blocks


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    """Put blocks back into the shape of a tensor."""
    return blocks.flatten(-2)[..., : like.shape[-1] if like.dim() else 1].reshape(like.shape)


def _to_e2m1(x: Tensor) -> Tensor:
    """Round to the values of E2M1, ties to even, saturating: the spacing is 0.5 below 2, then 1, then 2."""
    spacing = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return (x / spacing).round().mul(spacing).clamp(-E2M1, E2M1)


PRESETS = (
    Preset("vllm_fp8", "channel(e4m3)", "weights of vLLM's FP8: one float32 scale for each output channel"),
    Preset("vllm_int8", "channel(int(8, narrow=false, convention=gptq))", "weights of compressed-tensors' W8A8"),
)
STACKS: tuple[type[Quantizer] | Preset, ...] = (LlamaCppQ4, LlamaCppQ8, VllmNvfp4, *PRESETS)
