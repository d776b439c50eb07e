"""Products on a GPU, in Triton: codes under the scales of their blocks, and the last step of an integer product."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_sums(sums, y, row_scale, row_zero, row_sum, column_scale, column_zero, column_sum, bias, rows, columns,
               ROW_ZERO: tl.constexpr, COLUMN_ZERO: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Scale integer sums, as `scale_sums` in kernels.cpp: in float64, with one rounding."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    value = tl.load(sums + row * columns + column, mask=inside, other=0).to(tl.float64)
    if ROW_ZERO:
        value -= tl.load(row_zero + row) * tl.load(column_sum + column, mask=inside, other=0.0)
    if COLUMN_ZERO:
        value -= tl.load(column_zero + column, mask=inside, other=0.0) * tl.load(row_sum + row)
    value *= tl.load(row_scale + row).to(tl.float64)
    value *= tl.load(column_scale + column, mask=inside, other=0.0).to(tl.float64)
    if BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float64)
    tl.store(y + row * columns + column, value.to(tl.float32), mask=inside)


@triton.jit
def multiply_blocks(
    a, b, a_scale, b_scale, bias, y, rows, columns, inner, a_batch, b_batch, a_scales, b_scales,
    a_row, a_block, b_row, b_block, steps, tiles,
    STEPS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, A_SHARING: tl.constexpr, B_SHARING: tl.constexpr,
    WHOLE: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply codes [rows, inner] by codes [columns, inner] in steps, whose codes share a scale on either side.

    The products of a step are added up in int32 (WHOLE: both are int8) or in float32, scaled, and added in float32.
    If STEPS or TILES are 0, `steps` and `tiles` give the number of steps, and of tiles in a step.
    """
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    batch, program = (tl.program_id(0) // (down * across)).to(tl.int64), tl.program_id(0) % (down * across)
    band = program // (GROUP * across)  # programs that run at a time share what they read
    height = tl.minimum(down - band * GROUP, GROUP)
    within = program % (GROUP * across)
    row = (band * GROUP + within % height) * ROWS + tl.arange(0, ROWS)
    column = (within // height) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, TILE)
    a += batch * a_batch + row.to(tl.int64)[:, None] * inner + place[None, :]
    b += batch * b_batch + column.to(tl.int64)[None, :] * inner + place[:, None]
    a_scale += batch * a_scales + row.to(tl.int64) * a_row
    b_scale += batch * b_scales + column.to(tl.int64) * b_row
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps if STEPS == 0 else STEPS):
        part = tl.zeros((ROWS, COLUMNS), tl.int32 if WHOLE else tl.float32)
        for tile in range(tiles if TILES == 0 else TILES):
            first = (step * TILES + tile) * TILE
            left = tl.load(a + first, mask=(row < rows)[:, None] & (first + place < inner)[None, :], other=0)
            right = tl.load(b + first, mask=(column < columns)[None, :] & (first + place < inner)[:, None], other=0)
            if WHOLE:
                part = tl.dot(left, right, part, out_dtype=tl.int32)
            else:
                part = tl.dot(left.to(HALF), right.to(HALF), part)
        ours = tl.load(a_scale + (step * TILES * TILE // A_SHARING) * a_block, mask=row < rows, other=0.0)
        theirs = tl.load(b_scale + (step * TILES * TILE // B_SHARING) * b_block, mask=column < columns, other=0.0)
        total += (part.to(tl.float32) * ours[:, None]) * theirs[None, :]  # the product of two scales may not be finite
    if BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    target = y + (batch * rows + row.to(tl.int64)[:, None]) * columns + column[None, :]
    tl.store(target, total, mask=(row < rows)[:, None] & (column < columns)[None, :])
