"""Hardware that says what a recipe costs: time on devices, energy and area; and `qsim cost`."""

from __future__ import annotations

from qsim_core import Hardware, Preset, hookimpl
from qsim_hardware.energy import Area, Energy
from qsim_hardware.roofline import Roofline

__all__ = ["Area", "Energy", "Roofline"]

HALF, FP8, FP4 = ("fp16", "bf16"), ("e4m3", "e5m2"), ("e2m1",)


def _device(
    name: str,
    doc: str,
    bandwidth: int,
    half: float,
    *,
    int8: float | None = None,
    fp8: float | None = None,
    int4: float | None = None,
    fp4: float | None = None,
    float32: float | None = None,
) -> Preset:
    """A preset from a data sheet: dense TFLOP/s by format, and GB/s."""
    rates = {HALF: half, FP8: fp8, ("int8",): int8, FP4: fp4, ("int4",): int4}
    flops = ", ".join(
        f"[{format}, {rate:g}e12]" for formats, rate in rates.items() if rate is not None for format in formats
    )
    single = "" if float32 is None else f", float32={float32:g}e12"
    return Preset(name, f"roofline([{flops}], bandwidth={bandwidth}e9{single})", doc)


DEVICES = [
    _device("a100", "NVIDIA A100 SXM 80 GB", 2039, 312, int8=624, int4=1248, float32=19.5),
    _device("a6000", "NVIDIA RTX A6000", 768, 154.8, int8=309.7, int4=619.3, float32=38.7),
    _device("h100", "NVIDIA H100 SXM", 3350, 989, fp8=1979, int8=1979, float32=67),
    _device("h200", "NVIDIA H200 SXM", 4800, 989, fp8=1979, int8=1979, float32=67),
    _device("b200", "NVIDIA B200", 8000, 2250, fp8=4500, int8=4500, fp4=9000, float32=75),
    _device("l40s", "NVIDIA L40S", 864, 362, fp8=733, int8=733, float32=91.6),
    _device("mi300x", "AMD MI300X; INT8 not verified", 5300, 1307, fp8=2615, int8=2615, float32=163.4),
    Preset("tpu_v5e", "roofline([[bf16, 197e12], [int8, 394e12]], bandwidth=819e9)", "Google TPU v5e"),
]
"""By the vendors' data sheets, without sparsity; the README names each."""


@hookimpl
def qsim_hardware() -> list[type[Hardware] | Preset]:
    return [Roofline, *DEVICES, Energy, Area]
