"""The blockwise arithmetic, on GPUs: codes of at most 8 bits under the scales of their blocks, in one kernel.

The products of codes that share a scale on either side are added up first. Integers are added in int32, exactly.
Other codes are multiplied as bfloat16, which holds their significands, and added in float32. Each such sum is scaled
once, and added to the others in float32:

    y  =  sum over blocks of  (s t) sum over k of q r

The float32 reference multiplies and rounds each s q t r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsim_core.matmuls.call import LINEAR, Call
from qsim_core.matmuls.layout import SECOND_LAST
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.sites.arithmetic import Lowering
from qsim_core.sites.workspace import Memory
from qsim_fast import quantizing
from qsim_fast.identity_cache import cached_by_identity
from qsim_fast.int8 import encode_matrix, to_nearest
from qsim_fast.kernels import gpu
from qsim_fast.quantizing import scheme_of
from qsim_fast.significands import SMALLEST_SAFE, significand_bits

ROW = 2**30
"""The length of a block that is a whole row."""


@cached_by_identity
def fits(scheme: Any) -> bool:
    """Tell if a scheme makes codes that bfloat16 holds, under scales of rows or of blocks along them."""
    if not isinstance(scheme, Scheme) or not scheme.symmetric or isinstance(scheme.granularity, tuple):
        return False
    if not quantizing.uses_base_methods(type(scheme)) or significand_bits(scheme.element) > 8:
        return False
    steps = scheme.element.steps
    return steps is not None and steps.smallest >= SMALLEST_SAFE


def block_of(quantizer: Any, inner: int) -> int:
    """Give the number of columns of a row that share a scale."""
    granularity = scheme_of(quantizer).granularity
    return granularity if isinstance(granularity, int) and granularity < inner else ROW


def step_of(quantizers: Sequence[Any], inner: int) -> int:
    """Give the number of columns that have one scale on either side."""
    return min(inner, math.gcd(*(block_of(quantizer, inner) for quantizer in quantizers)))


def possible(call: Call, quantizers: Sequence[Any]) -> bool:
    """Tell if the kernel can multiply these operands.

    Both are summed along their rows, enough columns share a scale, and both sides have as many matrices.
    """
    first, second = (layout.rows(operand) for layout, operand in zip(call.layouts, call.operands, strict=True))
    alike = second.dim() == 2 or first.shape[:-2] == second.shape[:-2]
    along_rows = call.function in LINEAR or call.layouts[1] is SECOND_LAST
    inner = first.shape[-1]
    return alike and along_rows and gpu.tile_of(step_of(quantizers, inner), inner) >= gpu.SHORTEST_TILE


@dataclass(frozen=True)
class BlockwiseRows:
    """Rows [..., R, K] as codes, with the scales [rows or 1, blocks or 1] of all rows."""

    codes: Tensor
    scales: Scales
    block: int

    def values(self) -> Tensor:
        """Compute the values, float32."""
        inner = self.codes.shape[-1]
        scale = self.scales.scale.repeat_interleave(min(self.block, inner), -1)[..., :inner]
        return (self.codes.float().flatten(0, -2) * scale).view_as(self.codes)

    def matrices(self, shape: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        """Bring codes and scales into the kernel's shapes, [S, R, K] and [S or 1, R or 1, blocks or 1].

        `shape` is [..., R].
        """
        samples, rows = math.prod(shape[:-1]), shape[-1]
        scale = self.scales.scale
        scale = scale.view(samples, rows, -1) if len(scale) > 1 else scale.unsqueeze(0)
        return self.codes.view(samples, rows, -1), scale, self.block


def encode_rows(
    quantizer: Any, rows: Tensor, known: Scales | None = None, memory: Memory | None = None
) -> BlockwiseRows | None:
    """Quantize rows to codes; None where a static scale would hide a NaN.

    With `known` scales the rows are values that were rounded under these already.
    """
    scheme, static = (
        scheme_of(quantizer),
        quantizer.scales(rows) if isinstance(quantizer, StaticScheme) else known,
    )
    matrix = rows.detach().reshape(-1, rows.shape[-1])
    whole = scheme.element.is_integer and scheme.element.min >= -128 and scheme.element.max <= 127
    if whole and static is not known and bool(matrix.isnan().any()):
        return None
    dtype = torch.int8 if whole else torch.bfloat16
    codes, scales = encode_matrix(scheme, matrix, static, 0.0, dtype, memory)
    return BlockwiseRows(codes.view(rows.shape), scales, block_of(quantizer, rows.shape[-1]))


class BlockwiseProduct(Lowering):
    """A product of codes under the scales of their blocks. The codes of an overwritten weight are made again."""

    arithmetic = "blockwise"

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> BlockwiseRows | None:
        return encode_rows(self.quantizers[place], rows, memory=memory)

    def again(self, rows: Tensor, kept: Scales) -> BlockwiseRows | None:
        return encode_rows(to_nearest(scheme_of(self.quantizers[1])), rows, kept)

    def product(self, call: Call, first: BlockwiseRows, second: BlockwiseRows) -> Tensor:
        kernels = gpu.kernels_on(first.codes.device)
        assert kernels is not None  # the plan was made with them
        shape = first.codes.shape
        matrices = second.codes.dim() > 2
        left = first.matrices(shape[:-1] if matrices else (1, math.prod(shape[:-1])))
        right = second.matrices(second.codes.shape[:-1] if matrices else (1, len(second.codes)))
        bias = call.bias if call.function in LINEAR else None
        bias = None if bias is None else bias.detach().float().contiguous()
        y: Tensor = kernels.multiply(left, right, step_of(self.quantizers, shape[-1]), bias)
        return y.view(*shape[:-1], second.codes.shape[-2])
