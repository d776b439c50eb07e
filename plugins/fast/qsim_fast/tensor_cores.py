"""Arithmetic of GPUs that is taken only where it is asked for by name, for its sums are not float32's.

`tf32` multiplies significands of 11 bits, exactly where both operands have no more, and adds up in float32; what a
matrix unit does with the last bits of a sum is its own. `fp8` multiplies FP8 codes under the scales of rows; the
units of a Hopper GPU add up their products with some 14 bits.
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
from qsim_core.quantizers.static_scale import StaticScheme, scheme_of
from qsim_core.sites.arithmetic import Lowering
from qsim_core.sites.workspace import Memory
from qsim_fast import quantizing
from qsim_fast.int8 import ROW_SCALES, encoded
from qsim_fast.significands import significand_of

TF32_SIGNIFICAND = 11
"""Bits of TF32's significands, the hidden one counted."""
FP8 = {(3, -6, 448.0): torch.float8_e4m3fn, (2, -14, 57344.0): torch.float8_e5m2}
"""Mantissa, smallest exponent and largest value of the formats that a GPU multiplies."""


def fits_tf32(scheme: Any) -> bool:
    """Whether TF32 holds the values of a scheme, or of a format."""
    return significand_of(scheme) <= TF32_SIGNIFICAND


def fits_fp8(scheme: Any) -> bool:
    """Whether a scheme makes e4m3 or e5m2 codes under scales of rows, of the tensor, or under none."""
    if isinstance(scheme, Scheme) and (scheme.granularity not in ROW_SCALES or not quantizing.as_written(type(scheme))):
        return False
    return code_type(scheme) is not None


def possible_in_fp8(call: Call, operands: Sequence[Any]) -> bool:
    """Whether the GPU multiplies FP8, these shapes (sixteens) and types (not e5m2 twice)."""
    sizes = call.layouts[1].rows(call.operands[1]).shape
    types = {code_type(scheme_of(quantizer)) for quantizer in operands}
    able = torch.version.hip is None and torch.cuda.get_device_capability(call.operands[0].device) >= (8, 9)
    return able and all(size % 16 == 0 for size in sizes) and torch.float8_e4m3fn in types


@dataclass(frozen=True)
class Exact:
    """Rows in float32, quantized."""

    rows: Tensor

    def values(self) -> Tensor:
        return self.rows


class TF32Product(Lowering):
    """Operands as they are in float32, multiplied as TF32."""

    arithmetic = "tf32"

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> Exact:
        return Exact(self.quantizers[place].quantize(rows))

    def again(self, rows: Tensor, kept: bool) -> Exact:
        return Exact(rows)

    def pinned(self, rows: Tensor, scales: Any) -> Exact:
        return Exact(rows)

    def keep(self, made: Exact) -> bool:
        return True

    def product(self, call: Call, first: Exact, second: Exact) -> Tensor:
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
class Codes8:
    """Rows [..., K] as FP8 codes, and the scale of each row, or one: [rows or 1, 1]."""

    codes: Tensor
    scales: Scales

    def values(self) -> Tensor:
        """What they stand for, float32."""
        return (self.codes.float().flatten(0, -2) * self.scales.scale).view(self.codes.shape)


class FP8Product(Lowering):
    """Operands as FP8 codes, which the GPU multiplies itself."""

    arithmetic = "fp8"

    def take(self, place: int, rows: Tensor, memory: Memory | None = None) -> Codes8:
        return _in_fp8(self.quantizers[place], rows, memory=memory)

    def again(self, rows: Tensor, kept: Scales) -> Codes8:
        return _in_fp8(self.quantizers[1], rows, kept)

    def product(self, call: Call, first: Codes8, second: Codes8) -> Tensor:
        one = torch.ones((), device=first.codes.device)
        matrix = first.codes.flatten(0, -2)
        sums = torch._scaled_mm(matrix, second.codes.T, one, one, out_dtype=torch.float32, use_fast_accum=False)
        sums = sums.mul_(first.scales.scale).mul_(second.scales.scale.T)
        sums = sums if call.bias is None else sums.add_(call.bias)
        result: Tensor = sums.unflatten(0, call.operands[0].shape[:-1])
        return result


def code_type(scheme: Any) -> torch.dtype | None:
    """The dtype of a scheme's or a format's FP8 codes."""
    bare = unscaled_format(scheme)
    element = scheme.element if isinstance(scheme, Scheme) else bare
    steps = None if element is None else quantizing.rule(element)
    if steps is None or steps.fixed or -steps.low != steps.high:
        return None
    return FP8.get((steps.mantissa, steps.min_exponent, steps.high))


def _in_fp8(quantizer: Any, rows: Tensor, known: Scales | None = None, memory: Memory | None = None) -> Codes8:
    """Rows as the quantizer rounds them; with `known` scales, as they have been rounded."""
    scheme, static = scheme_of(quantizer), quantizer.scales(rows) if isinstance(quantizer, StaticScheme) else known
    matrix, dtype = rows.detach().reshape(-1, rows.shape[-1]), code_type(scheme_of(quantizer))
    assert dtype is not None
    if isinstance(scheme, Scheme):
        wide, scales = encoded(scheme, matrix, static, 0.0, torch.bfloat16, memory)
    else:
        wide, scales = scheme.quantize(matrix).contiguous(), Scales(torch.ones(1, 1, device=rows.device), None)
    return Codes8(wide.to(dtype).view(rows.shape), scales)
