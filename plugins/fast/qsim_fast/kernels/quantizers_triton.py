"""The kernels of `kernels.cpp` for GPUs, in Triton: one pass over memory, the reference's bits.

A tensor is rows x columns, contiguous. A block is `length` columns of one row; the last one may be short. A program
takes PER_PROGRAM blocks, each padded to a power of two. To give the reference's bits, divisions are IEEE's, and no
multiplication is fused with an addition (`EXACT` in `qsim_fast.kernels.gpu`).
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

VALUES, CODES, UNITS, WITHOUT_TENSOR_SCALE, NONZERO_KEPT = (tl.constexpr(kind) for kind in range(5))
"""The kinds of results: values, int8 codes, units of the scale, values without the tensor scale, non-zero bfloat16."""
DIVIDE, CEIL, EVEN, RCEIL = tl.constexpr(1), tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
BFLOAT16, E8M0, GRID = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _load(x, place, inside):
    """Load values as float32; int16 holds the bits of bfloat16."""
    values = tl.load(x + place, mask=inside, other=0)
    if x.dtype.element_ty == tl.int16:  # noqa: SIM108
        number = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        number = values
    return number


@triton.jit
def _place(
    blocks,
    columns,
    per_row,
    length,
    FLAT: tl.constexpr,
    FULL: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    """Give the row, the place along it and the columns of this program's blocks, and a mask of what is inside.

    FLAT: blocks fill their rows, so that they lie one after another as in one row. FULL: their length is WIDTH.
    """
    block = tl.program_id(0).to(tl.int64) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    along = tl.arange(0, WIDTH)[None, :]
    inside = (block < blocks)[:, None] & ((along >= 0) if FULL else (along < length))
    if FLAT:
        row, place = 0 * block, block
    else:
        row, place = block // per_row, block % per_row
    column = place[:, None] * (WIDTH if FULL else length) + along
    if not FLAT:
        inside &= column < columns
    return block, row, place, column, inside


@triton.jit
def _clamp(x, low, high):  # NaN stays
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _finite(x):
    """Replace Inf by NaN."""
    return tl.where(tl.abs(x) <= LARGEST, x, x - x)


@triton.jit
def _nearest(x, smallest, magic, FIXED: tl.constexpr, SIGNED_ZERO: tl.constexpr):
    """Round to the format's nearest value, ties to even: adding a large number drops the bits below a step."""
    if FIXED:
        large = smallest * magic
    else:
        binade = (_bits(x) & 0x7F800000).to(tl.float32, bitcast=True)
        large = tl.where(binade < smallest, smallest, binade) * magic
    rounded = (x + large) - large
    if SIGNED_ZERO:
        return ((_bits(rounded) & 0x7FFFFFFF) | (_bits(x) & -0x80000000)).to(tl.float32, bitcast=True)
    return rounded + 0.0


@triton.jit
def _to_bfloat16(x):
    """Round to bfloat16, ties to even, as a float32 whose lower half is zero; NaN stays."""
    bits = _bits(x)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def _upper_half(x):
    """Take the upper half of a float32: the bits of a bfloat16."""
    return (_bits(x) >> 16).to(tl.int16)


@triton.jit
def _ordered(x):
    """Map floats to integers in the same order; NaN comes after Inf, so that an extreme shows it."""
    bits = _bits(x)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _extremes(x, inside, MAGNITUDE: tl.constexpr):
    """Find the lowest and the highest value of each row; of magnitudes the highest alone, twice."""
    if MAGNITUDE:
        high = tl.max(tl.where(inside, _bits(x) & 0x7FFFFFFF, 0), axis=1).to(tl.float32, bitcast=True)
        return high, high
    least = tl.min(tl.where(inside, _ordered(x), 0x7FFFFFFF), axis=1)
    most = tl.max(tl.where(inside, _ordered(x), -0x80000000), axis=1)
    low = (least ^ ((least >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    high = (most ^ ((most >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    number = (low == low) & (high == high)
    return tl.where(number, low, low + high), tl.where(number, high, low + high)


@triton.jit
def _power_of_two(high, largest, top, tie, RULE: tl.constexpr):
    """Compute `qsim_core.formats.rounding.power_of_two_scale`."""
    value = high
    if RULE == RCEIL:
        value = tl.div_rn(high, largest)
    bits = value.to(tl.float64).to(tl.int64, bitcast=True)  # no float32 is subnormal in float64
    fraction = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    if RULE == CEIL or RULE == RCEIL:  # noqa: SIM109
        exponent += (fraction > 0.5).to(tl.int64)
    if RULE == EVEN:
        exponent += (fraction >= tie).to(tl.int64)
    if RULE != RCEIL:
        exponent -= top
    exponent = tl.where(value > 0, exponent, -149)
    exponent = tl.where(exponent < -149, -149, tl.where(exponent > 127, 127, exponent))
    power = ((exponent + 1023) << 52).to(tl.float64, bitcast=True).to(tl.float32)
    return tl.where(tl.abs(high) <= LARGEST, power, high - high)


@triton.jit
def _scales(
    low, high, grid_low, grid_high, reach, largest, top, tie, limit, tensor_scale,
    scale_low, scale_high, scale_smallest, scale_magic,
    RULE: tl.constexpr, ROUNDING: tl.constexpr, ZERO_POINTS: tl.constexpr, ABSMAX: tl.constexpr,
    SCALE_FIXED: tl.constexpr, SCALE_SIGNED_ZERO: tl.constexpr,
):  # fmt: skip
    """Compute scales and zero points from ranges, as `Scheme.covering` and `Scheme.rounded_scale` do.

    The third result is the scales divided by the tensor scale.
    """
    if ZERO_POINTS:
        if ABSMAX:
            high = tl.where(tl.abs(low) > tl.abs(high), tl.abs(low), tl.abs(high))
            low = -high
        low, high = tl.where(low > 0, 0.0, low), tl.where(high < 0, 0.0, high)
        exact = tl.div_rn(high - low, reach)
        apart = tl.div_rn(high, reach) - tl.div_rn(low, reach)
        scale = _finite(tl.where((tl.abs(exact) <= LARGEST) | (exact != exact), exact, apart))  # an overflow
    elif RULE == DIVIDE:
        high = tl.where(high <= 0, 0.0, high)  # never -0
        scale = _finite(tl.div_rn(high, reach))
    else:
        scale = _power_of_two(tl.where(high <= 0, 0.0, high), largest, top, tie, RULE)
    if ROUNDING != 0:
        scale = tl.where(scale > limit, limit, scale)
    if ROUNDING == BFLOAT16:
        scale = _finite(_to_bfloat16(scale))
    if ROUNDING == E8M0:
        scale = tl.where(scale < 5.877471754111438e-39, 5.877471754111438e-39, scale)  # 2^-127
    if ROUNDING == GRID:
        divisor = tl.where(tensor_scale == 0, 1.0, tensor_scale)
        units = _clamp(tl.div_rn(scale, divisor), scale_low, scale_high)
        own = _nearest(units, scale_smallest, scale_magic, SCALE_FIXED, SCALE_SIGNED_ZERO)
        scale = _finite(own * tensor_scale)
    else:
        own = scale
    zero = 0 * scale
    if ZERO_POINTS:
        offset = tl.div_rn(low, tl.where(scale == 0, 1.0, scale))
        zero = _clamp(grid_low - ((offset + 12582912.0) - 12582912.0), grid_low, grid_high)
    return scale, zero, own


@triton.jit
def extremes(x, low, high, blocks, columns, per_row, length, FLAT: tl.constexpr, FULL: tl.constexpr,
             WIDTH: tl.constexpr, PER_PROGRAM: tl.constexpr, MAGNITUDE: tl.constexpr):  # fmt: skip
    """Find the lowest and the highest value of each block; MAGNITUDE: the highest magnitude, in `high`."""
    block, row, _, column, inside = _place(blocks, columns, per_row, length, FLAT, FULL, WIDTH, PER_PROGRAM)
    values = _load(x, row[:, None] * columns + column, inside)
    lowest, highest = _extremes(values, inside, MAGNITUDE)
    tl.store(high + block, highest, mask=block < blocks)
    if not MAGNITUDE:
        tl.store(low + block, lowest, mask=block < blocks)


@triton.jit
def round_blocks(
    x, y, scales, zeros, tensor_scale, blocks, columns, per_row, length, sharing, out_row, scale_row, scale_block,
    shift, grid_low, grid_high, overflow, bound, smallest, magic,
    reach, largest, top, tie, limit, scale_low, scale_high, scale_smallest, scale_magic,
    FLAT: tl.constexpr, ONE: tl.constexpr, FULL: tl.constexpr, WIDTH: tl.constexpr, PER_PROGRAM: tl.constexpr,
    KIND: tl.constexpr, COMPILED: tl.constexpr,
    FIXED: tl.constexpr, SIGNED_ZERO: tl.constexpr, SATURATE: tl.constexpr,
    RULE: tl.constexpr, ROUNDING: tl.constexpr, ZERO_POINTS: tl.constexpr, MAGNITUDE: tl.constexpr,
    ABSMAX: tl.constexpr, SCALE_FIXED: tl.constexpr, SCALE_SIGNED_ZERO: tl.constexpr,
):  # fmt: skip
    """Round x under its blocks' scales: computed and written (RULE is not 0), or given for `sharing` columns."""
    block, row, place, column, inside = _place(blocks, columns, per_row, length, FLAT, FULL, WIDTH, PER_PROGRAM)
    values = _load(x, row[:, None] * columns + column, inside)
    if FLAT or ONE:
        own = row * scale_row + place * scale_block
    else:
        own = row * scale_row + (place * length // sharing) * scale_block
    if RULE != 0:
        low, high = _extremes(values, inside, MAGNITUDE)
        scale, zero, apart = _scales(
            low, high, grid_low, grid_high, reach, largest, top, tie, limit, tl.load(tensor_scale),
            scale_low, scale_high, scale_smallest, scale_magic,
            RULE, ROUNDING, ZERO_POINTS, ABSMAX, SCALE_FIXED, SCALE_SIGNED_ZERO,
        )  # fmt: skip
        tl.store(scales + own, scale, mask=block < blocks)
        if ZERO_POINTS:
            tl.store(zeros + own, zero, mask=block < blocks)
    else:
        scale = tl.load(scales + own, mask=block < blocks, other=1.0)
        zero, apart = 0 * scale, scale
        if ZERO_POINTS:
            zero = tl.load(zeros + own, mask=block < blocks, other=0.0)
    scale, zero = scale[:, None], zero[:, None]
    if SATURATE:
        divisor = tl.where(scale == 0, 1.0, scale)
        units = _clamp(tl.div_rn(values, divisor), grid_low - zero, grid_high - zero)
        units = _nearest(units, smallest, magic, FIXED, SIGNED_ZERO and not ZERO_POINTS)
        if KIND == CODES:
            units = tl.where(units == units, units + (zero - shift), 0.0)
        elif KIND == WITHOUT_TENSOR_SCALE:
            units = units * apart[:, None]
        elif KIND != UNITS:
            units = units * scale
    else:
        lowest = tl.where(grid_low < 0, -bound, grid_low)
        units = _nearest(_clamp(values, lowest, bound), smallest, magic, FIXED, SIGNED_ZERO)
        units = tl.where(units > grid_high, overflow, units)
        units = tl.where(units < grid_low, tl.where(grid_low < 0, -overflow, grid_low), units)
    target = y + row[:, None] * out_row + column
    if KIND == CODES:
        tl.store(target, units.to(tl.int32).to(tl.int8), mask=inside)
    elif KIND == NONZERO_KEPT:
        half = _to_bfloat16(units)
        least = ((_bits(units) & -0x80000000) | 0x10000).to(tl.float32, bitcast=True)  # bfloat16's smallest
        half = tl.where((half == 0) & (units != 0), least, half)
        if COMPILED:
            tl.store(target, half.to(tl.bfloat16), mask=inside)
        else:
            tl.store(target, _upper_half(half), mask=inside)
    elif COMPILED:
        tl.store(target, units.to(y.dtype.element_ty), mask=inside)
    elif y.dtype.element_ty == tl.int16:
        tl.store(target, _upper_half(_to_bfloat16(units)), mask=inside)
    else:
        tl.store(target, units, mask=inside)


@triton.jit
def any_below(x, found, length, bound, WIDTH: tl.constexpr):
    """Set `found` if a non-zero value has a magnitude below `bound`; both are bits of bfloat16."""
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    magnitude = tl.load(x + place, mask=place < length, other=0).to(tl.int32) & 0x7FFF
    some = tl.max(((magnitude != 0) & (magnitude < bound)).to(tl.int32), axis=0)
    if some != 0:
        tl.store(found, 1)
