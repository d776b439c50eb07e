// Kernels that take one pass over memory, where the reference in Python takes many: the extremes of blocks, rounding
// under scales, and the scaling of integer sums. Results are the reference's, bit for bit (test_fast_quantizing.py), so
// this file must not be compiled with -ffast-math, nor with contraction into fused multiply-adds.
//
// A tensor is rows x columns, contiguous. A block is `block` columns of one row; the last one may be short.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "grid.h"

namespace {

struct BFloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

inline void store(float *to, float x) { *to = x; }
inline void store(int8_t *to, float x) { *to = int8_t(int32_t(x)); }
inline void store(BFloat16 *to, float x) { // to nearest, ties to even; NaN stays NaN
    uint32_t bits = bits_as<uint32_t>(x);
    uint16_t rounded = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    to->bits = x != x ? uint16_t(0x7fc0) : rounded;
}

// bfloat16 in which a non-zero value stays non-zero.
struct NonzeroKept {
    uint16_t bits;
};

inline void store(NonzeroKept *to, float x) {
    BFloat16 rounded;
    store(&rounded, x);
    to->bits = (rounded.bits & 0x7fff) == 0 && x != 0 ? uint16_t(rounded.bits | 1) : rounded.bits;
}

// The number of rows that a thread takes at a time: some 64 KiB.
inline int64_t grain(int64_t columns) { return columns < 16384 ? 16384 / columns : 1; }

// The rule by which the range of a block becomes its scale: `Scheme.covering` and `Scheme.rounded_scale`.
struct Scaling {
    int32_t rule;        // 0: given; 1: divided by `reach`; 2 to 5: a power of two: floor, ceil, even, rceil
    int32_t rounding;    // of the scale, 0: none, 1: bfloat16, 2: E8M0, which holds powers of two, 3: `grid`
    int32_t zero_points; // 0: symmetric
    int32_t magnitude;   // 1: the range is that of the magnitudes
    int32_t absmax;      // 1: with a zero point, the range extends as far to either side
    float reach;         // the highest magnitude maps to this; with zero points: the number of steps
    float largest;       // the element's largest value
    int32_t top;         // the exponent of `largest`
    double tie;          // rule `even` takes the next power from this fraction on, of 0.5 to 1
    float limit;         // the largest scale; larger ones saturate
    float tensor_scale;  // the scale of the scales; 1: they have none
    Grid grid;
};

struct Task {
    int64_t rows, columns, block;
    float *scale; // [rows, blocks] by these strides: given, or to be written
    int64_t scale_row, scale_block;
    float *zero;     // null: none; else by the strides of the scales
    float unit;      // codes are stored in multiples of this part of a unit of the scale,
    float shift;     // less this
    int64_t out_row; // elements from one row of the result to the next
    int32_t threads;
    int32_t saturate; // 1: values that are too large saturate, whatever the format does without a scale
    Scaling scaling;
};

// Map floats to integers in the same order; NaN comes after Inf, so that an extreme shows it.
inline int32_t ordered(float x) {
    int32_t bits = bits_as<int32_t>(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

template <class In>
inline void extremes_of(int64_t length, const In *x, bool magnitude, float *low, float *high) {
    if (magnitude) {
        int32_t most = 0;
        for (int64_t i = 0; i < length; i++) {
            int32_t bits = bits_as<int32_t>(load(x[i])) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        *high = bits_as<float>(most);
        return;
    }
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < length; i++) {
        int32_t key = ordered(load(x[i]));
        least = key < least ? key : least;
        most = key > most ? key : most;
    }
    float a = bits_as<float>(least ^ (least >> 31 & 0x7fffffff)), b = bits_as<float>(most ^ (most >> 31 & 0x7fffffff));
    bool number = a == a && b == b;
    if (low) *low = number ? a : NAN;
    *high = number ? b : NAN;
}

// The power of two that a rule makes of the highest magnitude: qsim_core.formats.rounding.power_of_two_scale.
inline float power_of_two(float high, const Scaling &scaling) {
    float value = scaling.rule == 5 ? high / scaling.largest : high;
    if (!(std::fabs(high) <= FLT_MAX)) return NAN;
    int exponent = -149;
    if (value > 0) {
        double wide = value; // as a float64, no float32 is subnormal
        uint64_t bits = bits_as<uint64_t>(wide);
        double fraction = bits_as<double>((bits & 0x000fffffffffffffu) | 0x3fe0000000000000u);
        exponent = int(bits >> 52 & 0x7ff) - 1023;
        if (scaling.rule == 3 || scaling.rule == 5) exponent += fraction > 0.5;
        if (scaling.rule == 4) exponent += fraction >= scaling.tie;
        if (scaling.rule != 5) exponent -= scaling.top;
        exponent = exponent < -149 ? -149 : exponent > 127 ? 127 : exponent;
    }
    return float(bits_as<double>(uint64_t(exponent + 1023) << 52));
}

inline float finite(float x) { return std::fabs(x) <= FLT_MAX ? x : NAN; }

// Compute the scales of a row's blocks from their ranges. Scales overwrite `high`, zero points overwrite `low`.
// Each step is a loop over all blocks, so that the compiler vectorizes it.
inline void scales_of(int64_t blocks, float *__restrict low, float *__restrict high, const Scaling &scaling, const Grid &grid) {
    if (scaling.zero_points) {
        for (int64_t b = 0; b < blocks; b++) {
            float from = low[b], to = high[b];
            if (scaling.absmax) {
                to = std::fabs(from) > std::fabs(to) ? std::fabs(from) : std::fabs(to);
                from = -to;
            }
            from = from > 0 ? 0 : from;
            to = to < 0 ? 0 : to;
            float exact = (to - from) / scaling.reach, apart = to / scaling.reach - from / scaling.reach;
            low[b] = from;
            high[b] = finite(std::fabs(exact) <= FLT_MAX || exact != exact ? exact : apart); // the difference overflowed
        }
    } else if (scaling.rule == 1) {
        for (int64_t b = 0; b < blocks; b++) high[b] = finite((high[b] <= 0 ? 0 : high[b]) / scaling.reach); // never -0
    } else {
        for (int64_t b = 0; b < blocks; b++) high[b] = power_of_two(high[b] <= 0 ? 0 : high[b], scaling);
    }
    if (scaling.rounding) {
        for (int64_t b = 0; b < blocks; b++) high[b] = high[b] > scaling.limit ? scaling.limit : high[b];
    }
    if (scaling.rounding == 1) {
        for (int64_t b = 0; b < blocks; b++) {
            BFloat16 half;
            store(&half, high[b]);
            high[b] = finite(load(half));
        }
    } else if (scaling.rounding == 2) {
        for (int64_t b = 0; b < blocks; b++) high[b] = high[b] < 0x1p-127f ? 0x1p-127f : high[b];
    } else if (scaling.rounding == 3) {
        float divisor = scaling.tensor_scale == 0 ? 1.0f : scaling.tensor_scale;
        for (int64_t b = 0; b < blocks; b++) {
            float x = clamp(high[b] / divisor, scaling.grid.low, scaling.grid.high);
            float units = scaling.grid.fixed ? nearest<true>(x, scaling.grid) : nearest<false>(x, scaling.grid);
            high[b] = finite(units * scaling.tensor_scale);
        }
    }
    if (scaling.zero_points) {
        for (int64_t b = 0; b < blocks; b++) {
            float divisor = high[b] == 0 ? 1.0f : high[b];
            low[b] = clamp(grid.low - std::nearbyint(low[b] / divisor), grid.low, grid.high);
        }
    }
}

// Round a block in units of its scale, less the zero point if it has one. The usual lengths are passed as constants,
// for which the compiler unrolls the loops.
template <class In, class Out, bool fixed>
inline void round_block(int64_t length, const In *__restrict x, Out *__restrict y, float scale, float zero, const Task &task,
                        const Grid &grid) {
    constexpr bool codes = sizeof(Out) == 1;
    float divisor = scale == 0 ? 1.0f : scale;
    if (fixed && (task.zero || codes)) {
        float low = grid.low - zero, high = grid.high - zero, offset = zero - task.shift;
        for (int64_t i = 0; i < length; i++) {
            float units = nearest<fixed>(clamp(load(x[i]) / divisor, low, high), grid);
            store(y + i, codes ? units * task.unit + offset : units * scale);
        }
    } else if (task.saturate) {
        for (int64_t i = 0; i < length; i++) {
            float units = nearest<fixed>(clamp(load(x[i]) / divisor, grid.low, grid.high), grid);
            store(y + i, codes ? units * task.unit - task.shift : units * scale);
        }
    } else {
        float low = grid.low < 0 ? -grid.bound : grid.low, past = grid.low < 0 ? -grid.overflow : grid.low;
        for (int64_t i = 0; i < length; i++) {
            float value = nearest<fixed>(clamp(load(x[i]), low, grid.bound), grid);
            value = value > grid.high ? grid.overflow : value;
            store(y + i, value < grid.low ? past : value);
        }
    }
}

template <class In>
inline void extremes_row(int64_t columns, int64_t block, const In *x, bool magnitude, float *low, float *high) {
    for (int64_t start = 0, b = 0; start < columns; start += block, b++) {
        int64_t left = columns - start, length = left < block ? left : block;
        float *lowest = low ? low + b : nullptr;
        if (length == 16) extremes_of<In>(16, x + start, magnitude, lowest, high + b);
        else if (length == 32) extremes_of<In>(32, x + start, magnitude, lowest, high + b);
        else if (length == 64) extremes_of<In>(64, x + start, magnitude, lowest, high + b);
        else extremes_of<In>(length, x + start, magnitude, lowest, high + b);
    }
}

template <class In, class Out, bool fixed>
void round_rows(const In *__restrict x, Out *__restrict y, const Task &given, const Grid &shared) {
    const Task task = given; // copies of each thread, which cannot alias the results
    const Grid grid = shared;
#pragma omp parallel for num_threads(task.threads) schedule(dynamic, grain(task.columns)) firstprivate(task, grid)
    for (int64_t row = 0; row < task.rows; row++) {
        const In *from = x + row * task.columns;
        Out *to = y + row * task.out_row;
        float *scales = task.scale + row * task.scale_row, *zeros = task.zero ? task.zero + row * task.scale_row : nullptr;
        if (task.scaling.rule) {
            extremes_row<In>(task.columns, task.block, from, task.scaling.magnitude, zeros, scales);
            scales_of((task.columns + task.block - 1) / task.block, zeros, scales, task.scaling, grid);
        }
        for (int64_t start = 0, b = 0; start < task.columns; start += task.block, b++) {
            int64_t left = task.columns - start, length = left < task.block ? left : task.block;
            float scale = scales[b * task.scale_block], zero = zeros ? zeros[b * task.scale_block] : 0.0f;
            const In *in = from + start;
            Out *out = to + start;
            if (length == 16) round_block<In, Out, fixed>(16, in, out, scale, zero, task, grid);
            else if (length == 32) round_block<In, Out, fixed>(32, in, out, scale, zero, task, grid);
            else if (length == 64) round_block<In, Out, fixed>(64, in, out, scale, zero, task, grid);
            else round_block<In, Out, fixed>(length, in, out, scale, zero, task, grid);
        }
    }
}

template <class In, class Out> void round_as(const In *x, Out *y, const Task &task, const Grid &grid) {
    if (grid.fixed) round_rows<In, Out, true>(x, y, task, grid);
    else round_rows<In, Out, false>(x, y, task, grid);
}

template <class In>
void extremes_rows(const In *x, int64_t rows, int64_t columns, int64_t block, float *low, float *high, int threads) {
    int64_t blocks = (columns + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(dynamic, grain(columns))
    for (int64_t row = 0; row < rows; row++)
        extremes_row<In>(columns, block, x + row * columns, !low, low ? low + row * blocks : nullptr, high + row * blocks);
}

typedef float Four __attribute__((vector_size(16)));
typedef double FourWide __attribute__((vector_size(32)));

inline FourWide wide(const float *x) {
    Four values;
    std::memcpy(&values, x, sizeof values);
    return __builtin_convertvector(values, FourWide);
}

// The sums over one row: squares of values and of errors in float64, values that became zero, and values outside.
struct RowSums {
    FourWide signal[2] = {}, error[2] = {};
    int64_t flushed = 0, outside = 0;
};

constexpr int64_t LOOKED_AT = 64;

template <class In>
inline void add_part(int64_t length, const In *x, const In *y, float divisor, float zero, float low, float high, RowSums &sums) {
    float before[LOOKED_AT] = {}, after[LOOKED_AT] = {};
    for (int64_t i = 0; i < length; i++) before[i] = load(x[i]), after[i] = load(y[i]);
    int32_t flushed = 0, inside = 0;
    for (int64_t i = 0; i < length; i++) {
        float units = before[i] / divisor + zero;
        flushed += (before[i] != 0) & (after[i] == 0);
        inside += (units >= low) & (units <= high);
    }
    sums.flushed += flushed, sums.outside += length - inside;
    for (int64_t i = 0; i < length; i += 8) {
        for (int64_t half = 0; half < 2; half++) {
            FourWide value = wide(before + i + 4 * half), error = value - wide(after + i + 4 * half);
            sums.signal[half] += value * value;
            sums.error[half] += error * error;
        }
    }
}

inline double total(const FourWide *parts) {
    FourWide sum = parts[0] + parts[1];
    return sum[0] + sum[1] + (sum[2] + sum[3]);
}

template <class In>
void error_rows(const In *x, const In *y, const Task &task, float low, float high, double *sums, int64_t *counts) {
#pragma omp parallel for num_threads(task.threads) schedule(dynamic, grain(task.columns))
    for (int64_t row = 0; row < task.rows; row++) {
        RowSums found;
        for (int64_t start = 0, b = 0; start < task.columns; start += task.block, b++) {
            int64_t place = row * task.scale_row + b * task.scale_block, end = start + task.block;
            float scale = task.scale[place], zero = task.zero ? task.zero[place] : 0.0f, divisor = scale == 0 ? 1.0f : scale;
            end = end < task.columns ? end : task.columns;
            for (int64_t part = start; part < end; part += LOOKED_AT) {
                int64_t at = row * task.columns + part, left = end - part;
                if (left >= LOOKED_AT) add_part<In>(LOOKED_AT, x + at, y + at, divisor, zero, low, high, found);
                else if (left == 32) add_part<In>(32, x + at, y + at, divisor, zero, low, high, found);
                else if (left == 16) add_part<In>(16, x + at, y + at, divisor, zero, low, high, found);
                else add_part<In>(left, x + at, y + at, divisor, zero, low, high, found);
            }
        }
        sums[2 * row] = total(found.signal), sums[2 * row + 1] = total(found.error);
        counts[2 * row] = found.flushed, counts[2 * row + 1] = found.outside;
    }
}

} // namespace

extern "C" {

// Add up each row of x, and of x - y: sums [rows, 2] of squares. Count values that became zero, and those that lie
// outside of `low` to `high` in units of their scale: counts [rows, 2].
void error_sums(const void *x, const void *y, int32_t bfloat16, const Task *task, float low, float high, double *sums,
                int64_t *counts) {
    if (bfloat16) error_rows((const BFloat16 *)x, (const BFloat16 *)y, *task, low, high, sums, counts);
    else error_rows((const float *)x, (const float *)y, *task, low, high, sums, counts);
}

// Find the lowest and the highest value of each block; with `low` null, the highest magnitude. NaN gives NaN.
void extremes(const void *x, int32_t bfloat16, int64_t rows, int64_t columns, int64_t block, float *low, float *high,
              int32_t threads) {
    if (bfloat16) extremes_rows((const BFloat16 *)x, rows, columns, block, low, high, threads);
    else extremes_rows((const float *)x, rows, columns, block, low, high, threads);
}

// Round x under its scales: to values in float32 (kind 0) or bfloat16 (1), to codes in int8 (2), or to values in bfloat16
// where a non-zero value stays non-zero (3).
void round_to_grid(const void *x, int32_t bfloat16, void *y, int32_t kind, const Task *task, const Grid *grid) {
    auto from = [&](auto *typed) {
        if (kind == 0) round_as(typed, (float *)y, *task, *grid);
        else if (kind == 1) round_as(typed, (BFloat16 *)y, *task, *grid);
        else if (kind == 3) round_as(typed, (NonzeroKept *)y, *task, *grid);
        else round_as(typed, (int8_t *)y, *task, *grid);
    };
    if (bfloat16) from((const BFloat16 *)x);
    else from((const float *)x);
}

// Tell if any non-zero value has a magnitude below `bound`. Both are bits of bfloat16.
int32_t any_below(const void *x, int64_t length, int32_t bound, int32_t threads) {
    int32_t found = 0;
    const uint16_t *bits = (const uint16_t *)x;
#pragma omp parallel for num_threads(threads) reduction(| : found)
    for (int64_t i = 0; i < length; i++) {
        uint16_t magnitude = bits[i] & 0x7fff;
        found |= magnitude != 0 && magnitude < bound;
    }
    return found;
}

// Turn integer sums [rows, columns] into float32, in the same memory: (sum - row_zero * column_sum - column_zero * row_sum)
// times the row's and the column's scale, plus the bias, in float64 with one rounding. Null: no zero points, no bias.
void scale_sums(void *sums, int64_t rows, int64_t columns, const float *row_scale, const double *row_zero,
                const double *column_sum, const double *row_sum, const double *column_zero, const float *column_scale,
                const float *bias, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, grain(columns))
    for (int64_t row = 0; row < rows; row++) {
        int32_t *sum = (int32_t *)sums + row * columns;
        float *result = (float *)sum;
        double scale = row_scale[row];
        double zero = row_zero ? row_zero[row] : 0.0, total = row_sum ? row_sum[row] : 0.0;
#pragma GCC ivdep
        for (int64_t i = 0; i < columns; i++) {
            double value = sum[i];
            if (row_zero) value -= zero * column_sum[i];
            if (column_zero) value -= column_zero[i] * total;
            value = value * scale * double(column_scale[i]);
            result[i] = float(bias ? value + double(bias[i]) : value);
        }
    }
}
}
