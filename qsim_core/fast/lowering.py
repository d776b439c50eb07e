"""Products in another arithmetic than the model's float32, where that gives the same numbers, and sooner.

What float32 adds up in some order, with a rounding at each step, has none in `qsim_core.fast.int8` but the last, and in
`qsim_core.fast.bf16` and, on GPUs, `qsim_core.fast.blockwise` the same ones in another order. Where nothing is gained the path is
`float32`: the operands' values, multiplied as the model does it. What gives other numbers has to be asked for by name
(`qsim_core.fast.named`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsim_core.fast import bf16, blockwise, gpu, int8
from qsim_core.fast.bf16 import BF16, Convolved
from qsim_core.fast.blockwise import Blockwise
from qsim_core.fast.fused import DEVICES, followed
from qsim_core.fast.int8 import Int8
from qsim_core.fast.named import TF32, Native8, fits_fp8, fits_tf32, possible_in_fp8
from qsim_core.formats.format import unscaled_format
from qsim_core.matmuls.call import LINEAR, Call
from qsim_core.matmuls.convolution import CONVOLUTIONS
from qsim_core.quantizers.static_scale import scheme_of
from qsim_core.sites.lowered import Form

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)


def choose(wanted: str, call: Call, roles: Sequence[str], quantizers: Sequence[Any]) -> Form | None:
    """The form that operands take on the path that is `wanted`, or for `auto` on the one that is fastest here.

    `quantizers` are those of the two operands and of the result. None: their values, in float32.
    """
    linear = call.function in LINEAR and list(roles) == ["input", "weight"]
    products = call.function in PRODUCTS and "weight" not in roles
    convolution = call.function in CONVOLUTIONS and list(roles) == ["input", "weight"]
    if wanted == "float32" or not (linear or products or convolution) or not _plain(call):
        return None
    *operands, output = quantizers
    if any(getattr(quantizer, "multiplier", None) is not None for quantizer in operands):
        return None
    if torch.is_grad_enabled() and any(getattr(quantizer, "learns", False) for quantizer in quantizers):
        return None
    schemes = [scheme_of(quantizer) for quantizer in operands]
    on_a_gpu = gpu.used_for(call.operands[0])
    bare = unscaled_format(output)
    if on_a_gpu and not convolution:
        return _on_a_gpu(wanted, call, linear, operands, schemes)
    if wanted in ("int8", "auto" if _vnni() else "") and linear and all(map(int8.fits, schemes)):
        return Int8(operands)
    faster = on_a_gpu or _bf16()
    if wanted in ("bf16", "auto" if faster else "") and bare is not None and bare.native is torch.bfloat16:
        form = Convolved if convolution else BF16
        return form(operands, not products and call.bias is not None) if all(map(bf16.fits, schemes)) else None
    return None


def _on_a_gpu(wanted: str, call: Call, linear: bool, operands: Sequence[Any], schemes: Sequence[Any]) -> Form | None:
    if wanted in ("int8", "auto") and linear and all(map(int8.fits, schemes)) and int8.possible(call):
        return Int8(operands)
    able = gpu.sums_in_float32(call.operands[0].device)
    if wanted in ("bf16", "auto") and able and all(map(bf16.fits_factored, schemes)):
        return BF16(operands, biased=False, rounds=False)
    if wanted in ("blockwise", "auto") and all(map(blockwise.fits, schemes)):
        there = gpu.found(call.operands[0].device) is not None
        return Blockwise(operands) if there and blockwise.possible(call, operands) else None
    if wanted == "tf32" and all(map(fits_tf32, schemes)):
        return TF32(operands)
    if wanted == "fp8" and linear and all(map(fits_fp8, schemes)):
        return Native8(operands) if possible_in_fp8(call, operands) else None
    return None


def _plain(call: Call) -> bool:
    """Whether a call is a product of float32 matrices and no more, and nobody wants its gradient."""
    if call.kwargs.get("out") is not None or call.kwargs.get("alpha", 1) != 1 or call.kwargs.get("beta", 1) != 1:
        return False
    if not _fitting(call):
        return False
    device = call.operands[0].device
    for operand in call.operands:
        if operand.dtype != torch.float32 or operand.device != device or operand.dim() < 2 or not operand.numel():
            return False
        if followed(operand):
            return False
    inner = call.layouts[0].rows(call.operands[0]).shape[-1]
    known = device.type in DEVICES and not torch.is_autocast_enabled(device.type)
    return known and 1 < inner <= int8.LONGEST  # torch._int_mm is wrong for one column


def _fitting(call: Call) -> bool:
    """Whether what a linear call adds is a row of numbers, one for each output, and wants no gradient."""
    if call.function in PRODUCTS or (bias := call.bias) is None:
        return True
    kernel = call.operands[1] if call.function in CONVOLUTIONS else call.layouts[1].rows(call.operands[1])
    return bias.shape == (len(kernel),) and bias.device == call.operands[0].device and not followed(bias)


@functools.cache
def _vnni() -> bool:
    """Whether this processor multiplies int8 faster than float32."""
    return bool(torch.cpu._is_vnni_supported())


@functools.cache
def _bf16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
