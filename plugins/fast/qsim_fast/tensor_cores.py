"""The arithmetics `tf32` and `fp8` of GPUs: a recipe has to name them, because their sums are not float32's.

`tf32` multiplies significands of up to 11 bits exactly, and adds up in float32; the matrix unit decides about the last
bits of a sum. `fp8` multiplies FP8 codes under the scales of rows; a Hopper GPU adds up the products with some 14 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsim_core.formats.format import unscaled_format
from qsim_core.matmuls.call import Call
from qsim_core.quantizers.scales import Scales
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.sites.arithmetic import Lowering
from qsim_core.sites.workspace import Memory
from qsim_fast import quantizing
from qsim_fast.int8 import ROW_SCALES, encode_matrix
from qsim_fast.quantizing import scheme_of
from qsim_fast.significands import significand_bits_of

TF32_SIGNIFICAND = 11
"""The bits of a TF32 significand, the hidden one included."""
FP8 = {(3, -6, 448.0): torch.float8_e4m3fn, (2, -14, 57344.0): torch.float8_e5m2}
"""The FP8 formats that a GPU multiplies, by mantissa bits, smallest exponent and largest value."""


def fits_tf32(scheme: Any) -> bool:
    """Tell if TF32 holds the values of a scheme, or of a format."""
    return significand_bits_of(scheme) <= TF32_SIGNIFICAND


def fits_fp8(scheme: Any) -> bool:
    """Tell if a scheme or a format makes e4m3 or e5m2 codes, without scales or under those of rows or of the tensor."""
    if isinstance(scheme, Scheme) and (
        scheme.granularity not in ROW_SCALES or not quantizing.uses_base_methods(type(scheme))
    ):
        return False
    return code_type(scheme) is not None


def possible_in_fp8(call: Call, operands: Sequence[Any]) -> bool:
    """Tell if the GPU multiplies FP8, with these shapes (multiples of sixteen) and types (not e5m2 twice)."""
    sizes = call.layouts[1].rows(call.operands[1]).shape
    types = {code_type(scheme_of(quantizer)) for quantizer in operands}
    able = torch.version.hip is None and torch.cuda.get_device_capability(call.operands[0].device) >= (8, 9)
    return able and all(size % 16 == 0 for size in sizes) and torch.float8_e4m3fn in types


@dataclass(frozen=True)
class Float32Rows:
    """Quantized rows in float32."""

    rows: Tensor

    def values(self) -> Tensor:
        return self.rows


class TF32Product(Lowering):
    """A product of quantized float32 operands, multiplied as TF32."""

    arithmetic = "tf32"

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> Float32Rows:
        return Float32Rows(self.quantizers[place].quantize(rows))

    def again(self, rows: Tensor, kept: bool) -> Float32Rows:
        return Float32Rows(rows)

    def pinned(self, rows: Tensor, scales: Any) -> Float32Rows:
        return Float32Rows(rows)

    def keep(self, made: Float32Rows) -> bool:
        return True

    def product(self, call: Call, first: Float32Rows, second: Float32Rows) -> Tensor:
        values = [layout.back(operand.rows) for layout, operand in zip(call.layouts, (first, second), strict=True)]
        with _as_tf32():
            result: Tensor = call.run(values)
        return result


@contextlib.contextmanager
def _as_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class FP8Rows:
    """Rows [..., K] as FP8 codes, and the scale of each row, or one: [rows or 1, 1]."""

    codes: Tensor
    scales: Scales

    def values(self) -> Tensor:
        """Compute the values, float32."""
        return (self.codes.float().flatten(0, -2) * self.scales.scale).view(self.codes.shape)


class FP8Product(Lowering):
    """A product of FP8 codes."""

    arithmetic = "fp8"

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> FP8Rows:
        return _fp8_rows(self.quantizers[place], rows, memory=memory)

    def again(self, rows: Tensor, kept: Scales) -> FP8Rows:
        return _fp8_rows(self.quantizers[1], rows, kept)

    def product(self, call: Call, first: FP8Rows, second: FP8Rows) -> Tensor:
        one = torch.ones((), device=first.codes.device)
        matrix = first.codes.flatten(0, -2)
        sums = torch._scaled_mm(matrix, second.codes.T, one, one, out_dtype=torch.float32, use_fast_accum=False)
        sums = sums.mul_(first.scales.scale).mul_(second.scales.scale.T)
        sums = sums if call.bias is None else sums.add_(call.bias)
        result: Tensor = sums.unflatten(0, call.operands[0].shape[:-1])
        return result


def code_type(scheme: Any) -> torch.dtype | None:
    """Give the FP8 dtype of the codes of a scheme or a format; None: FP8 has not these values."""
    bare = unscaled_format(scheme)
    element = scheme.element if isinstance(scheme, Scheme) else bare
    steps = None if element is None else quantizing.rounding_rule(element)
    if steps is None or steps.fixed or -steps.low != steps.high:
        return None
    return FP8.get((steps.mantissa, steps.min_exponent, steps.high))


def _fp8_rows(quantizer: Any, rows: Tensor, known: Scales | None = None, memory: Memory | None = None) -> FP8Rows:
    """Quantize rows to FP8 codes; with `known` scales they were rounded under these already."""
    scheme, static = (
        scheme_of(quantizer),
        quantizer.scales(rows) if isinstance(quantizer, StaticScheme) else known,
    )
    matrix, dtype = rows.detach().reshape(-1, rows.shape[-1]), code_type(scheme_of(quantizer))
    assert dtype is not None
    if isinstance(scheme, Scheme):
        wide, scales = encode_matrix(scheme, matrix, static, 0.0, torch.bfloat16, memory)
    else:
        wide, scales = scheme.quantize(matrix).contiguous(), Scales(torch.ones(1, 1, device=rows.device), None)
    return FP8Rows(wide.to(dtype).view(rows.shape), scales)
