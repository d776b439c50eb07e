"""Energy and area of a recipe's products, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from qsim_core import Cost, SiteWork
from qsim_hardware.arithmetic_units import INTERPOLATION, Figures, multiply_and_add
from qsim_hardware.forward import CountedHardware

SRAM = {"8KB": 10.0, "32KB": 20.0, "1MB": 100.0, "none": 0.0}
"""Picojoules to read or write 64 bits, by the size of the memory."""
WORD = 64
PICO = 1e-12


class Energy(CountedHardware):
    """The energy of multipliers, adders and memory.

        joules = multiplications * (multiply + add) + bits / 64 * (dram + 2 buffer)

    Each bit is moved between DRAM and the units through a buffer, which is written and read once. Multipliers have the
    widths of the operands' formats, adders that of the arithmetic's accumulator.

    Source: M. Horowitz, ISSCC 2014, with an interpolation between the widths of its table.
    """

    name = "energy"
    node: Literal["45nm"] = Field("45nm", description="the process of the table")
    dram: float = Field(1950.0, ge=0, description="picojoules for 64 bits of DRAM; the table has 1300 to 2600")
    buffer: Literal["8KB", "32KB", "1MB", "none"] = Field("1MB", description="the memory that each bit passes")

    def cost(self, work: Sequence[SiteWork]) -> Cost:
        """Compute the joules of each product, and add them up."""
        sites: dict[str, dict[str, Any]] = {}
        arithmetic = memory = 0.0
        for one in work:
            unit, figures = multiply_and_add(one)
            computing = one.product.multiplications * figures.picojoules * PICO
            moving = one.bytes * 8 / WORD * (self.dram + 2 * SRAM[self.buffer]) * PICO
            arithmetic, memory = arithmetic + computing, memory + moving
            site = sites.setdefault(one.site, {"joules": 0.0})
            site |= {"joules": site["joules"] + computing + moving, "unit": unit}
        return Cost(
            totals={"joules": arithmetic + memory, "joules_of_arithmetic": arithmetic, "joules_of_memory": memory},
            sites=sites,
            assumptions=[
                INTERPOLATION,
                f"each bit through DRAM and a buffer once (DRAM {self.dram:g} pJ for 64 bits, buffer {self.buffer})",
                "matmuls alone; no leakage, no control, no rounding to formats",
            ],
        )


class Area(CountedHardware):
    """The area of one multiplier with its adder, for each pair of formats that meets in a product.

    The total is that of one unit of each kind, which a chip for this recipe needs at least.

    Source: M. Horowitz, ISSCC 2014, with an interpolation between the widths of its table.
    """

    name = "area"
    node: Literal["45nm"] = Field("45nm", description="the process of the table")

    def cost(self, work: Sequence[SiteWork]) -> Cost:
        """Find the units that the products need, and add up their areas."""
        units: dict[str, Figures] = {}
        sites: dict[str, dict[str, float | str]] = {}
        for one in work:
            unit, figures = multiply_and_add(one)
            units[unit] = figures
            sites[one.site] = {"square_micrometres": figures.square_micrometres, "unit": unit}
        return Cost(
            totals={"square_micrometres": sum(figures.square_micrometres for figures in units.values())},
            sites=sites,
            assumptions=[INTERPOLATION, f"one unit of each kind: {'; '.join(units) or 'none'}", "no memory, no wires"],
        )
