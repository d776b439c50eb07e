"""The exact arithmetics: products computed faster than float32's, where the numbers are the same.

`int8` adds up integers exactly and rounds once. `bf16` and, on GPUs, `blockwise` round as float32 does, in another
order of summation. A recipe has to name `tf32` and `fp8`: they add up with the precision of a GPU's matrix unit.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsim_core import ExactArithmetic
from qsim_core.formats.format import unscaled_format
from qsim_core.matmuls.call import LINEAR, Call
from qsim_core.matmuls.convolution import CONVOLUTIONS
from qsim_core.matmuls.layout import POSITIONS
from qsim_core.sites.arithmetic import Lowering, NarrowSums
from qsim_fast import bf16, blockwise, int8, integer_blocks, tensor_cores
from qsim_fast.bf16 import BF16Convolution, BF16Product
from qsim_fast.blockwise import BlockwiseProduct
from qsim_fast.int8 import Int8Product
from qsim_fast.integer_blocks import SMALLEST_PRODUCT, IntegerBlocksProduct
from qsim_fast.kernels import gpu, native
from qsim_fast.quantizing import DEVICES, needs_reference, scheme_of
from qsim_fast.tensor_cores import FP8Product, TF32Product

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)


@dataclass(frozen=True)
class Kind:
    """The kind of a call that an exact arithmetic may compute."""

    linear: bool
    """True for an input times the rows of a weight."""
    convolution: bool
    on_a_gpu: bool
    schemes: tuple[Any, ...]
    """The quantizers of the operands, without the scales that a site holds."""


class _Exact(ExactArithmetic):
    """An exact arithmetic of this plugin: it plans calls of a known kind."""

    def lower(self, call: Call, roles: Sequence[str], quantizers: Sequence[Any]) -> Lowering | None:
        """Plan the call; None if it is not a plain product of float32 matrices, or not exact."""
        kind = _kind(call, roles, quantizers)
        return None if kind is None else self.plan(call, kind, quantizers)

    def plan(self, call: Call, kind: Kind, quantizers: Sequence[Any]) -> Lowering | None:
        """Plan a call of this kind; `quantizers` are those of the two operands and of the result."""
        raise NotImplementedError


class INT8(_Exact):
    """Integers of at most 8 bits, multiplied and added up exactly, and scaled once.

    For integer formats under tensor, token and channel scales. Sums are exact in int32; scaling is done in float64.
    """

    name = "int8"
    order: ClassVar[int] = 10

    def worthwhile(self, call: Call) -> bool:
        """True on a GPU, and on processors with VNNI."""
        return _vnni() or gpu.computes_on_gpu(call.operands[0])

    def plan(self, call: Call, kind: Kind, quantizers: Sequence[Any]) -> Lowering | None:
        if not kind.linear or not all(map(int8.fits, kind.schemes)):
            return None
        return Int8Product(quantizers[:2]) if not kind.on_a_gpu or int8.possible(call) else None


class INT8Blocks(_Exact):
    """Codes of at most 8 bits under the scales of their blocks, multiplied by one kernel, on CPUs.

    The codes of a block are added up exactly in int32, then scaled and added to the other blocks in float32.
    """

    name = "int8_blocks"
    order: ClassVar[int] = 15

    def worthwhile(self, call: Call) -> bool:
        """True on a processor that multiplies int8 by its own instructions, for products of some size."""
        rows = call.layouts[1].rows(call.operands[1])
        large = rows.dim() > 1 and call.operands[0].numel() * rows.shape[-2] >= SMALLEST_PRODUCT
        return large and _multiplies_int8() and native.available()

    def plan(self, call: Call, kind: Kind, quantizers: Sequence[Any]) -> Lowering | None:
        if kind.on_a_gpu or kind.convolution or not all(map(integer_blocks.fits, kind.schemes)):
            return None
        if not integer_blocks.possible(call):
            return None
        return IntegerBlocksProduct(quantizers[:2], batched=call.operands[1].dim() > 2)

    def lower_narrow(
        self, sums: NarrowSums, call: Call, roles: Sequence[str], quantizers: Sequence[Any]
    ) -> Lowering | None:
        """Plan a product with narrow sums; None if blocks of one operand begin inside those of the other."""
        lowering = self.lower(call, roles, quantizers)
        return lowering.narrowed(sums) if isinstance(lowering, IntegerBlocksProduct) else None


class BF16(_Exact):
    """Values that bfloat16 holds, multiplied in bfloat16 and added up in float32.

    On CPUs for results that are rounded to bfloat16 anyway; on GPUs for any result.
    """

    name = "bf16"
    order: ClassVar[int] = 20

    def worthwhile(self, call: Call) -> bool:
        """True on a GPU, and on processors that multiply bfloat16."""
        return _multiplies_bf16() or gpu.computes_on_gpu(call.operands[0])

    def plan(self, call: Call, kind: Kind, quantizers: Sequence[Any]) -> Lowering | None:
        *operands, output = quantizers
        if kind.on_a_gpu and not kind.convolution:
            able = gpu.sums_in_float32(call.operands[0].device) and all(map(bf16.fits_factored, kind.schemes))
            return BF16Product(operands, biased=False, rounds=False) if able else None
        bare = unscaled_format(output)
        if bare is None or bare.native is not torch.bfloat16 or not all(map(bf16.fits, kind.schemes)):
            return None
        made = BF16Convolution if kind.convolution else BF16Product
        return made(operands, biased=(kind.linear or kind.convolution) and call.bias is not None)


class Blockwise(_Exact):
    """Codes of at most 8 bits under the scales of their blocks, multiplied by one kernel, on GPUs.

    Int8Rows that share a scale on either side are added up first, integers in int32 and others in float32.
    """

    name = "blockwise"
    order: ClassVar[int] = 30

    def worthwhile(self, call: Call) -> bool:
        """True on a GPU."""
        return gpu.computes_on_gpu(call.operands[0])

    def plan(self, call: Call, kind: Kind, quantizers: Sequence[Any]) -> Lowering | None:
        operands = quantizers[:2]
        if not kind.on_a_gpu or kind.convolution or not all(map(blockwise.fits, kind.schemes)):
            return None
        there = gpu.kernels_on(call.operands[0].device) is not None
        return BlockwiseProduct(operands) if there and blockwise.possible(call, operands) else None


class TF32(_Exact):
    """Significands of at most 11 bits, multiplied as TF32 by a GPU.

    Its sums differ from float32's, so `auto` skips it.
    """

    name = "tf32"
    automatic: ClassVar[bool] = False

    def plan(self, call: Call, kind: Kind, quantizers: Sequence[Any]) -> Lowering | None:
        if not kind.on_a_gpu or kind.convolution or not all(map(tensor_cores.fits_tf32, kind.schemes)):
            return None
        return TF32Product(quantizers[:2])


class FP8(_Exact):
    """FP8 codes under scales of rows, multiplied by a GPU.

    Its sums differ from float32's, so `auto` skips it: a Hopper GPU adds up the products with some 14 bits.
    """

    name = "fp8"
    automatic: ClassVar[bool] = False

    def plan(self, call: Call, kind: Kind, quantizers: Sequence[Any]) -> Lowering | None:
        operands = quantizers[:2]
        fitting = kind.on_a_gpu and kind.linear and all(map(tensor_cores.fits_fp8, kind.schemes))
        return FP8Product(operands) if fitting and tensor_cores.possible_in_fp8(call, operands) else None


_last_kind: tuple[weakref.ref[Call], Kind | None] | None = None


def _kind(call: Call, roles: Sequence[str], quantizers: Sequence[Any]) -> Kind | None:
    """Give the kind of a call, found once for all arithmetics that plan it; None: none of them computes it."""
    global _last_kind
    known = _last_kind
    if known is None or known[0]() is not call:
        _last_kind = known = weakref.ref(call), _kind_of(call, roles, quantizers)
    return known[1]


def _kind_of(call: Call, roles: Sequence[str], quantizers: Sequence[Any]) -> Kind | None:
    with_weight = len(roles) == 2 and roles[0] == "input" and roles[1] == "weight"
    linear = call.function in LINEAR and with_weight
    products = call.function in PRODUCTS and "weight" not in roles
    convolution = call.function in CONVOLUTIONS and with_weight
    if not (linear or products or convolution) or not _plain(call):
        return None
    if torch.is_grad_enabled() and any(quantizer is not None and quantizer.learns for quantizer in quantizers):
        return None
    schemes = tuple(scheme_of(quantizer) for quantizer in quantizers[:2])
    return Kind(linear, convolution, gpu.computes_on_gpu(call.operands[0]), schemes)


def _plain(call: Call) -> bool:
    """Tell if a call is a product of float32 matrices and no more, without a gradient."""
    if call.kwargs.get("out") is not None or call.kwargs.get("alpha", 1) != 1 or call.kwargs.get("beta", 1) != 1:
        return False
    if not _bias_fits(call):
        return False
    device = call.operands[0].device
    for operand in call.operands:
        if operand.dtype != torch.float32 or operand.device != device or operand.dim() < 2 or not operand.numel():
            return False
        if needs_reference(operand):
            return False
    inner = call.layouts[0].rows(call.operands[0]).shape[-1]
    known = device.type in DEVICES and not torch.is_autocast_enabled(device.type)
    return known and 1 < inner <= int8.LONGEST  # torch._int_mm is wrong for one column


def _bias_fits(call: Call) -> bool:
    """Tell if a call has no bias, or one number for each output that needs no gradient."""
    if call.function in PRODUCTS or (bias := call.bias) is None:
        return True
    if call.layouts[0].name.startswith(POSITIONS):  # a bias goes with each position, and here a row holds several
        return False
    kernel = call.operands[1] if call.function in CONVOLUTIONS else call.layouts[1].rows(call.operands[1])
    return bias.shape == (len(kernel),) and bias.device == call.operands[0].device and not needs_reference(bias)


@functools.cache
def _vnni() -> bool:
    """Tell if this processor multiplies int8 faster than float32."""
    return bool(torch.cpu._is_vnni_supported())


@functools.cache
def _multiplies_int8() -> bool:
    """Tell if this processor has instructions that multiply int8 faster than float32."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")


@functools.cache
def _multiplies_bf16() -> bool:
    """Tell if this processor multiplies bfloat16 faster than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
