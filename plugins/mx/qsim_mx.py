"""Block formats with shared scales: `mx(element, n)`, the OCP MX names, NVFP4, MSFP, DeepSeek-V3's tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from qsim_core import Calibrator, Encoded, Format, Preset, QsimError, Quantizer, Scheme, hookimpl
from qsim_core.formats.quantizer import Granularity, floating, laid_out_as
from qsim_core.formats.rounding import ScaleRule, working
from qsim_core.quantizers.calibrators import ErrorOf
from qsim_core.quantizers.scales import Scales

DOUBLED = 8 / 7 * (1 - 2**-21)
"""From this multiple of the base on a scale becomes twice the base: 8/7, but for the rounding of quotients."""


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


class Microexponent(Quantizer):
    """Rounds scales so that n neighbours share a base, and each is the base or twice the base: one more bit for each.

    The base is half the largest of the n scales, rounded by `scale`. A scale of 8/7 of the base or more becomes twice
    the base. For powers of two these are the shared microexponents of MX4, MX6 and MX9 (arXiv 2302.08007). For scales
    max|x| / 1.75 it is HiFloat4's rule (arXiv 2602.11287): twice the base from max|x| = 2 base on.
    """

    name = "microexponent"
    n: PositiveInt = Field(8, description="scales that share a base; the last ones may be fewer")
    scale: Quantizer = Field("e8m0", description="rounds the bases")  # type: ignore[assignment]

    def _groups(self, x: Tensor) -> Tensor:
        """Split scales [..., B] into groups [..., ceil(B / n), n], filled up with zeros."""
        groups: Tensor = F.pad(x, (0, -x.shape[-1] % self.n)).unflatten(-1, (-1, self.n))
        return groups

    def _base(self, x: Tensor) -> Tensor:
        return self._groups(working(x)).amax(-1) / 2

    def _each(self, base: Tensor, length: int) -> Tensor:
        """The base of each of a number of scales, from those of groups."""
        return base.repeat_interleave(self.n, -1)[..., :length]

    def quantize(self, x: Tensor) -> Tensor:
        if floating(x).numel() == 0 or x.dim() == 0:
            return x.clone() if x.dim() else self.quantize(x.view(1)).view(())
        return laid_out_as(x, self.round_at(working(x), *self.scale_map(x)))

    def scale_map(self, x: Tensor) -> tuple[Tensor, None]:
        """Give the base of each of the scales [..., B]."""
        return self._each(self.scale.quantize(self._base(x)), x.shape[-1]), None

    def round_at(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Round scales `x` to their base `scale`, or twice the base."""
        return torch.where(x >= scale * DOUBLED, 2 * scale, scale)

    def encode(self, x: Tensor) -> Encoded:
        """Encode scales [..., B]: 1 for twice the base, and the encoded bases."""
        doubled = working(x) >= self.scale_map(x)[0] * DOUBLED
        return Encoded(doubled.to(torch.uint8), 1, x.dtype, self.scale.encode(self._base(x)))

    def encode_at(self, values: Tensor, known: Scales, of_scales: Scales | None = None) -> Encoded:
        """Encode rounded scales under known bases, one for each."""
        base = known.scale.view(values.shape)
        return Encoded((values > base).to(torch.uint8), 1, values.dtype, self.scale.encode(base[..., :: self.n]))

    def decode(self, encoded: Encoded) -> Tensor:
        assert isinstance(encoded.scales, Encoded)
        base = self._each(self.scale.decode(encoded.scales), encoded.codes.shape[-1])
        return (base * (1 + encoded.codes)).to(encoded.dtype)

    def bits_per_element(self, shape: torch.Size) -> float | None:
        length = shape[-1] if shape else 1
        bases = torch.Size([*shape[:-1], -(-length // self.n)])
        bits = self.scale.bits_per_element(bases)
        return None if bits is None else 1 + bits * bases[-1] / max(length, 1)

    @property
    def granularity(self) -> int:
        return self.n

    @property
    def by_rows(self) -> bool:
        return self.scale.by_rows

    @property
    def draws(self) -> bool:
        return self.scale.draws


@dataclass(frozen=True)
class BestEncoded(Encoded):
    """Codes and scales of blocks, each in the terms of the scheme that was taken for the block.

    Scales of scales have a first axis [number of schemes]: each scheme keeps its own.
    """

    choice: Tensor | None = None
    """The place of the scheme that each block has, uint8 [..., B]."""
    schemes: int = 1
    """The number of schemes, which says how many bits a choice takes."""

    @property
    def bits(self) -> int:
        return super().bits + (0 if self.choice is None else _bits_of_choice(self.schemes) * self.choice.numel())


def _bits_of_choice(schemes: int) -> int:
    return math.ceil(math.log2(schemes))


def _chosen(parts: Sequence[Tensor], choice: Tensor) -> Tensor:
    """Take each element from the part whose place `choice` names."""
    found = parts[0]
    for place, part in enumerate(parts[1:], 1):
        found = torch.where(choice == place, part, found)
    return found


def _merged(scales: Sequence[Tensor | Encoded | None], choice: Tensor) -> Tensor | Encoded | None:
    """The scales [..., B] of the schemes that were chosen. Scales of scales are stacked, one part for each scheme."""
    encoded = [part for part in scales if isinstance(part, Encoded)]
    if not encoded:
        tensors = [part for part in scales if isinstance(part, Tensor)]
        return _chosen(tensors, choice) if tensors else None
    codes, width = _chosen([part.codes for part in encoded], choice), max(part.width for part in encoded)
    above = [part.scales for part in encoded]
    if isinstance(above[0], Encoded):
        return replace(encoded[0], codes=codes, width=width, scales=Encoded.stack(above))  # type: ignore[arg-type]
    if above[0] is not None:
        return replace(encoded[0], codes=codes, width=width, scales=torch.stack(above))  # type: ignore[arg-type]
    return replace(encoded[0], codes=codes, width=width)


class Best(Quantizer):
    """Rounds each block of n elements along the rows by the one of several schemes that has the least Σ error².

    Of equal errors the first scheme's result is taken. The schemes have blocks of the same n. Which one was taken is
    stored with the scale of the block, and adds log2(number of schemes) / n bits to an element.
    """

    name = "best"
    schemes: tuple[Scheme, ...] = Field(description="schemes with blocks of the same length, like block(e2m1, 16)")

    @model_validator(mode="after")
    def _have_the_same_blocks(self) -> Self:
        if len(self.schemes) < 2:
            raise ValueError("give at least two schemes, as in best([block(e2m1, 16), block(int4, 16)])")
        for scheme in self.schemes:
            if not isinstance(scheme.granularity, int) or scheme.granularity != self.schemes[0].granularity:
                raise ValueError(f"{scheme} does not have the blocks of n elements along a row that the others have")
            if scheme.needs_held_scales("input"):
                raise ValueError(f"{scheme} has static or learned scales; here they are found anew for each tensor")
        return self

    def quantize(self, x: Tensor) -> Tensor:
        if floating(x).numel() == 0:
            return x.clone()
        best, _ = self._tried(working(x))
        return laid_out_as(x, self.schemes[0].join(best, x))

    def _tried(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round `x` in blocks [..., B, n], and give the place of the scheme that each block [..., B] takes."""
        first = self.schemes[0]
        values = first.split(x)
        best, least = values, values.new_full((), torch.inf)
        choice = torch.zeros(values.shape[:-1], dtype=torch.uint8, device=x.device)
        for place, scheme in enumerate(self.schemes):
            tried = first.split(scheme.quantize(x))
            error = (tried - values).square().sum(-1, keepdim=True)
            worse = error >= least  # a block with NaN takes the last scheme's NaN
            best, least = torch.where(worse, best, tried), torch.where(worse, least, error)
            choice = torch.where(worse.squeeze(-1), choice, place)
        return best, choice

    def encode(self, x: Tensor) -> BestEncoded:
        """Encode each block of `x` [..., K] by the scheme that it takes, with the place of this scheme.

        Raises `QsimError` for a value without a code, and if a scheme has no codes.
        """
        first, exact = self.schemes[0], working(floating(x))
        parts = [scheme.encode(exact) for scheme in self.schemes]
        if x.numel() == 0:
            return BestEncoded(parts[0].codes, parts[0].width, x.dtype)
        if len({type(part.scales) for part in parts}) > 1 or len({part.zero_points is None for part in parts}) > 1:
            raise QsimError(f"{self} mixes schemes with and without codes of scales or zero points; it has no codes")
        _, choice = self._tried(exact)
        codes = _chosen([first.split(part.codes) for part in parts], choice.unsqueeze(-1))
        zeros = [part.zero_points for part in parts if part.zero_points is not None]
        return BestEncoded(
            first.join(codes, x),
            max(part.width for part in parts),
            x.dtype,
            _merged([part.scales for part in parts], choice),
            _chosen(zeros, choice) if zeros else None,
            choice,
            len(parts),
        )

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode each block by its scheme, in the dtype that was encoded.

        Raises `QsimError` if another quantizer encoded it.
        """
        if encoded.codes.numel() == 0:
            return torch.empty_like(encoded.codes, dtype=encoded.dtype)
        choice: Tensor | None = getattr(encoded, "choice", None)
        if choice is None or getattr(encoded, "schemes", 0) != len(self.schemes):
            raise QsimError(f"these codes do not say which of the schemes of {self} each block has")
        first = self.schemes[0]
        decoded = []
        for place, scheme in enumerate(self.schemes):
            taken = choice == place
            codes = first.join(first.split(encoded.codes) * taken.unsqueeze(-1), encoded.codes)
            zeros = None if encoded.zero_points is None else encoded.zero_points * taken
            scales = encoded.scales
            if isinstance(scales, Encoded):
                above = None if scales.scales is None else scales.scales[place]
                scales = replace(scales, codes=scales.codes * taken, scales=above)
            decoded.append(first.split(scheme.decode(Encoded(codes, encoded.width, encoded.dtype, scales, zeros))))
        return first.join(_chosen(decoded, choice.unsqueeze(-1)), encoded.codes)

    def bits_per_element(self, shape: torch.Size) -> float | None:
        bits = [scheme.bits_per_element(shape) for scheme in self.schemes]
        known = [one for one in bits if one is not None]
        if len(known) < len(bits) or not shape:
            return None
        blocks = self.schemes[0].blocks_of(shape) / max(shape[-1], 1)
        return max(known) + _bits_of_choice(len(self.schemes)) * blocks

    @property
    def granularity(self) -> Granularity:
        return self.schemes[0].granularity

    @property
    def sharing(self) -> frozenset[Granularity]:
        return frozenset().union(*(scheme.sharing for scheme in self.schemes))

    @property
    def by_rows(self) -> bool:
        return all(scheme.by_rows for scheme in self.schemes)

    @property
    def draws(self) -> bool:
        return any(scheme.draws for scheme in self.schemes)


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
MICROEXPONENTS = [
    Preset(
        f"mx{bits + 1}",
        f"mx(int{bits}, n=2, scale=microexponent(8))",
        f"shared microexponents (arXiv 2302.08007): {bits} bits, an exponent for 16, a shift for 2",
    )
    for bits in (3, 5, 8)
]
HIF4 = Preset(
    "hif4",
    "block(int(4, fraction=2, rounding=away), n=4, scale=microexponent(2, scale=microexponent(8, scale=e6m2)))",
    "HiFloat4 (arXiv 2602.11287): an E6M2 scale for 64, a shift for 8 and one for 4 elements",
)
UE4M3, E3M3 = "e4m3(signed=false)", "float(3, mantissa=3, specials=fn, signed=false)"


def _with(special: float, scale: str, full_scale: float | None = None) -> str:
    """Write NVFP4 with one more value in its elements."""
    magnitudes = (0.5, 1, 1.5, 2, 3, 4, 6)
    values = sorted([0, special, *magnitudes, *(-value for value in magnitudes)])
    reach = "" if full_scale is None else f", full_scale={full_scale:g}"
    return f"scaled(codebook([{', '.join(f'{value:g}' for value in values)}]{reach}), 16, scale=scaled({scale}))"


CHOSEN = [
    Preset(
        "if4",
        f"best([scaled(e2m1, 16, scale=scaled({UE4M3})), scaled(int4, 16, scale=scaled({UE4M3}))])",
        "IF4 (arXiv 2603.28765): NVFP4 with E2M1 or 4-bit integers in each block",
    ),
    Preset(
        "razer",
        f"best([{_with(-5, UE4M3)}, {_with(5, UE4M3)}])",
        "RaZeR (arXiv 2501.04052) for activations: NVFP4 with -5 or 5 in place of -0 in each block",
    ),
    Preset(
        "razer_weights",
        "best(["
        + ", ".join(
            [*(_with(special, E3M3) for special in (5, -5))]
            + [_with(special, E3M3.replace(")", ", full_scale=21)"), full_scale=8) for special in (8, -8)]
        )
        + "])",
        "RaZeR for weights: ±5 or ±8 in place of -0, and E3M3 scales",
    ),
]
OTHERS = [
    Preset(
        "mxfp4_mr_gptq",
        "mx(e2m1, scale=at_scale(e8m0(rounding=away), scale=1.3333333333333333))",
        "MXFP4 with the scale 2^(floor(log2 max|x|) - 2) / 0.75 of MR-GPTQ (arXiv 2509.23202)",
    ),
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
    return [MX, Microexponent, Best, *OCP, *MSFP, *MICROEXPONENTS, HIF4, *CHOSEN, *OTHERS]


@hookimpl
def qsim_calibrators() -> list[type[Calibrator]]:
    return [FourOverSix]
