"""Multipliers and adders in 45 nm at 0.9 V: Horowitz's table, and an interpolation by widths between its entries.

Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qsim_core import SiteWork
from qsim_hardware.formats import format_of, name_of, significand_bits


@dataclass(frozen=True)
class Figures:
    """The energy of one operation in picojoules, and the area of its unit in square micrometres."""

    picojoules: float
    square_micrometres: float

    def __add__(self, other: Figures) -> Figures:
        """The figures of both operations together."""
        return Figures(self.picojoules + other.picojoules, self.square_micrometres + other.square_micrometres)


Table = Mapping[int, Figures]
INTEGER_ADD: Table = {8: Figures(0.03, 36), 16: Figures(0.05, 67), 32: Figures(0.1, 137)}
"""By the width of the sum."""
FLOAT_ADD: Table = {16: Figures(0.4, 1360), 32: Figures(0.9, 4184)}
"""By the width of the sum."""
INTEGER_MULTIPLY: Table = {8 * 8: Figures(0.2, 282), 32 * 32: Figures(3.1, 3495)}
"""By the product of the widths."""
FLOAT_MULTIPLY: Table = {11 * 11: Figures(1.1, 1640), 24 * 24: Figures(3.7, 7700)}
"""By the product of the bits of the significands, which are mantissa + 1."""
INTERPOLATION = "Horowitz's table (ISSCC 2014, 45 nm, 0.9 V), interpolated between its widths"


def interpolated(table: Table, width: int) -> Figures:
    """Read a table at a width: a power law through the two nearest entries, and beyond the ends too."""
    widths = sorted(table)
    after = min(max(1, next((i for i, known in enumerate(widths) if known >= width), len(widths))), len(widths) - 1)
    low, high = widths[after - 1], widths[after]
    share = math.log(width / low) / math.log(high / low)

    def between(first: float, second: float) -> float:
        return float(first * (second / first) ** share)

    first, second = table[low], table[high]
    return Figures(
        between(first.picojoules, second.picojoules), between(first.square_micrometres, second.square_micrometres)
    )


def multiply_and_add(one: SiteWork) -> tuple[str, Figures]:
    """The unit that multiplies two elements and adds the product to a sum: its name and its figures.

    A product of two integer formats has an integer multiplier and adder. Any other has those of floating point.
    """
    formats = [format_of(operand) for operand in one.operands]
    name = f"{' x '.join(map(name_of, one.operands))} + {one.accumulator_bits} bits"
    if all(format is not None and format.is_integer for format in formats):
        widths = math.prod(operand.width for operand in one.operands)
        tables = (INTEGER_MULTIPLY, INTEGER_ADD)
    else:
        widths = math.prod(map(significand_bits, formats))
        tables = (FLOAT_MULTIPLY, FLOAT_ADD)
    return name, interpolated(tables[0], widths) + interpolated(tables[1], one.accumulator_bits)
