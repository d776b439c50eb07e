"""The conformance suite of hardware, for every component and preset of the plugin."""

from __future__ import annotations

from qsim_core.testing import HardwareSuite


class TestHardware(HardwareSuite):
    text = (
        "roofline([[int8, 1e12], [bf16, 5e11]], bandwidth=1e11, float32=1e11, efficiency=0.7)",
        "a100",
        "a6000",
        "h100",
        "h200",
        "b200",
        "l40s",
        "mi300x",
        "tpu_v5e",
        "energy",
        'energy(dram=1300.0, buffer="8KB")',
        "area",
    )
