"""The int8 arithmetic: integers of at most 8 bits are multiplied and added up exactly, and scaled once.

The scales factor out of the sum (tensor, token, channel). With scales s, t and zero points z, y

    sum over k of s (q - z) t (r - y)  =  s t (Σ q r - z Σ r - y (Σ q - K z))

where Σ q r is added up in int32, exactly, and the rest computed in float64, with one rounding to float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsim_core.matmuls.call import Call
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.sites.arithmetic import Lowering
from qsim_core.sites.workspace import Memory, empty
from qsim_fast import quantizing
from qsim_fast.identity_cache import cached_by_identity
from qsim_fast.kernels.native import kernels_for
from qsim_fast.quantizing import scheme_of

ROW_SCALES = frozenset({"tensor", "channel", "token"})
LONGEST = 2**17 - 1
"""The number of products of two 8-bit integers whose sum stays within int32."""


@cached_by_identity
def fits(scheme: Any) -> bool:
    """Tell if a scheme makes codes of at most 8 bits, whose scales factor out of a product of rows."""
    if not isinstance(scheme, Scheme) or not scheme.element.is_integer or scheme.granularity not in ROW_SCALES:
        return False
    if scheme.element.draws or not quantizing.uses_base_methods(type(scheme)):
        return False
    return scheme.coded.max - scheme.coded.min <= 255


def possible(call: Call) -> bool:
    """Tell if a GPU's integer matmul takes these shapes: more than 16 rows, and multiples of eight."""
    rows, (outputs, inner) = call.operands[0], call.layouts[1].rows(call.operands[1]).shape
    return rows.numel() > 16 * inner and inner % 8 == 0 and outputs % 8 == 0


@dataclass(frozen=True)
class Int8Rows:
    """Rows [M, K] as int8 codes; the value of a code is scale * (code - zero)."""

    codes: Tensor
    scales: Scales
    """The scales as the scheme gives them: of each row, or one."""
    scale: Tensor
    """The scale of each row, float32 [M]."""
    zero: Tensor | None
    """The zero point of each row's codes, whole numbers in float64 [M]; None: all are zero."""

    @functools.cached_property
    def sums(self) -> Tensor:
        """The sum of each row's codes, float64 [M]."""
        return self.codes.sum(-1, dtype=torch.int32).double()

    def values(self) -> Tensor:
        """Compute the values, float32 [M, K]."""
        units = self.codes.float()
        units = units if self.zero is None else units.sub_(self.zero.float().unsqueeze(-1))
        return units.mul_(self.scale.unsqueeze(-1))


def encode_rows(
    quantizer: Any, rows: Tensor, known: Scales | None = None, memory: Memory | None = None
) -> Int8Rows | None:
    """Quantize rows [..., K] to codes; None where a static scale would hide a NaN.

    With `known` scales the rows are values that were rounded under these already.
    """
    scheme, static = (
        scheme_of(quantizer),
        quantizer.scales(rows) if isinstance(quantizer, StaticScheme) else known,
    )
    matrix = rows.detach().reshape(-1, rows.shape[-1])
    if static is not known and bool(matrix.isnan().any()):
        return None
    shift = (scheme.coded.max + scheme.coded.min + 1) // 2  # unsigned codes are moved into int8's range
    codes, scales = encode_matrix(scheme, matrix, static, shift, memory=memory)
    scale, zero = scales
    offset = (0.0 if zero is None else zero.double()) - shift
    if not isinstance(offset, Tensor):
        offset = matrix.new_full((1,), offset, dtype=torch.float64) if offset else None
    each = [None if t is None else t.reshape(-1).expand(len(matrix)).contiguous() for t in (scale, offset)]
    return Int8Rows(codes, scales, *each)  # type: ignore[arg-type]


def encode_matrix(
    scheme: Scheme,
    matrix: Tensor,
    static: Scales | None,
    shift: float,
    dtype: torch.dtype = torch.int8,
    memory: Memory | None = None,
) -> tuple[Tensor, Scales]:
    """Quantize rows [A, K] to int8 codes minus `shift`, or to units of their scales in `dtype`; give the scales too."""
    codes = empty(memory, *matrix.shape, dtype=dtype, device=matrix.device)
    return codes, encode_into(codes, scheme, matrix, static, shift)


def encode_into(
    codes: Tensor,
    scheme: Scheme,
    matrix: Tensor,
    static: Scales | None,
    shift: float,
    unit: float = 1.0,
    tensor_scale: Tensor | None = None,
) -> Scales:
    """Quantize rows [A, K] into `codes`, `unit` of them for a unit of the scale, minus `shift`; give the scales.

    `tensor_scale` is the scale of the scales, if it is known.
    """
    if (fast := quantizing.encode(scheme, matrix, static, shift, codes, unit, tensor_scale)) is not None:
        return fast
    blocks = scheme.split(matrix)
    if static is None and tensor_scale is not None:
        static = quantizing.scales_under(scheme, matrix, tensor_scale)
    elif static is None:
        static = scheme.scales(matrix)
    scale, zero = (None if t is None else t.unsqueeze(-1) for t in static)
    assert scale is not None
    units = scheme.units(blocks, scale, zero)
    found = (units * unit if zero is None else units + zero) - shift
    if not codes.dtype.is_floating_point:
        found = torch.where(scale.isnan(), 0.0, found)  # the result is NaN in any case
    codes.copy_(scheme.join(found, matrix).to(codes.dtype if codes.dtype.is_floating_point else torch.int16))
    return static


def product(x: Int8Rows, weight: Int8Rows, bias: Tensor | None) -> Tensor:
    """Multiply rows [M, K] by the rows of a weight [N, K], and add a bias [N]: float32 [M, N]."""
    sums = torch._int_mm(x.codes, weight.codes.T)
    row_zero, column_zero, inner = x.zero, weight.zero, x.codes.shape[1]
    row_sum = None if column_zero is None else x.sums if row_zero is None else x.sums - inner * row_zero
    column_sum = None if row_zero is None else weight.sums
    if (kernels := kernels_for(sums.numel(), sums.device)) is not None:
        bias = None if bias is None else bias.detach().float().contiguous()
        return kernels.scale_sums(sums, (x.scale, row_zero, row_sum), (weight.scale, column_zero, column_sum), bias)
    value = sums.double()
    if row_zero is not None and column_sum is not None:
        value -= row_zero.unsqueeze(-1) * column_sum
    if column_zero is not None and row_sum is not None:
        value -= column_zero * row_sum.unsqueeze(-1)
    value = value.mul_(x.scale.double().unsqueeze(-1)).mul_(weight.scale.double())
    return (value if bias is None else value.add_(bias)).float()


@cached_by_identity
def to_nearest(scheme: Scheme) -> Scheme:
    """Make the same scheme round to nearest: a value divided by its scale is a code, up to a rounding error."""
    return scheme.replace(element=scheme.element.replace(rounding="even"))


class Int8Product(Lowering):
    """A product of int8 codes, which take the place of an overwritten weight."""

    arithmetic = "int8"

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> Int8Rows | None:
        return encode_rows(self.quantizers[place], rows, memory=memory)

    def again(self, rows: Tensor, kept: Scales) -> Int8Rows | None:
        return encode_rows(to_nearest(scheme_of(self.quantizers[1])), rows, kept)

    def compact(self, made: Int8Rows) -> bool:
        return True

    def product(self, call: Call, first: Int8Rows, second: Int8Rows) -> Tensor:
        y: Tensor = product(first, second, call.bias).unflatten(0, call.operands[0].shape[:-1])
        return y
