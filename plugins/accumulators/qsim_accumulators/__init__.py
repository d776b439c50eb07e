"""Accumulators of chips: integers, fused dot products of matrix units, and narrow floats."""

from __future__ import annotations

from qsim_accumulators.floats import Chunked, Sequential, Tree
from qsim_accumulators.fused import Fused
from qsim_accumulators.integers import IntegerAccumulator
from qsim_core import Arithmetic, Preset, hookimpl

__all__ = ["Chunked", "Fused", "IntegerAccumulator", "Sequential", "Tree"]

HALF, FP8, NARROW = "[fp16, bf16]", "[e4m3, e5m2]", "[e4m3, e5m2, e3m2, e2m3, e2m1]"
INTEGERS = [
    Preset(f"int{bits}", f"integer({bits})", f"sums of whole numbers in {bits} bits, which wrap around")
    for bits in range(9, 33)
]
UNITS = [
    Preset("volta", "fused(4, fraction=23, inputs=[fp16])", "NVIDIA V100, FP16 into float32"),
    Preset("turing", "fused(4, fraction=24, inputs=[fp16])", "NVIDIA T4, FP16 into float32"),
    Preset("ampere", f"fused(8, fraction=24, inputs={HALF})", "NVIDIA A100 and Ada, FP16 and BF16 into float32"),
    Preset("ampere_tf32", "fused(4, fraction=24, inputs=[tf32])", "NVIDIA A100 and Ada, TF32 into float32"),
    Preset("ada_fp8", f"fused(16, fraction=13, output=e8m13, inputs={FP8})", "NVIDIA L40S, FP8"),
    Preset("hopper", f"fused(16, fraction=25, inputs={HALF})", "NVIDIA H100 and H200, FP16 and BF16 into float32"),
    Preset("hopper_fp8", f"fused(32, fraction=13, output=e8m13, inputs={FP8})", "NVIDIA H100 and H200, FP8"),
    Preset("blackwell", f"fused(16, fraction=25, inputs={HALF})", "NVIDIA B200, FP16 and BF16 into float32"),
    Preset(
        "blackwell_fp8", f"fused(32, fraction=25, inputs={NARROW})", "NVIDIA B200, FP8, FP6, FP4 without block scales"
    ),
    Preset("blackwell_mx", f"fused(32, fraction=25, inputs={NARROW}, scales=exponents)", "NVIDIA B200, MXFP8 to MXFP4"),
    Preset("blackwell_fp4", "fused(64, fraction=35, inputs=[e2m1], scales=groups)", "NVIDIA B200, NVFP4 and MXFP4"),
    Preset(
        "deepseek",
        f"fused(32, fraction=13, output=e8m13, promote=128, inputs={FP8})",
        "H100, FP8, with a float32 addition every 128 products (DeepSeek-V3, arXiv 2412.19437, 3.3.2)",
    ),
]


@hookimpl
def qsim_arithmetics() -> list[type[Arithmetic] | Preset]:
    return [IntegerAccumulator, *INTEGERS, Fused, *UNITS, Sequential, Chunked, Tree]
