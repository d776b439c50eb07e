// One pass over memory where the reference in Python takes many: the extremes of blocks, rounding under scales, and the
// last step of an integer product. Results are the reference's, bit for bit (tests/test_fused.py), so this file may not
// be compiled with -ffast-math or with contraction into fused multiply-adds.
//
// A tensor is rows x columns, contiguous; a block is `block` columns of one row, the last one may be short.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

struct BFloat16 {
    uint16_t bits;
};

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float load(float x) { return x; }
inline float load(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

inline void store(float *to, float x) { *to = x; }
inline void store(int8_t *to, float x) { *to = int8_t(int32_t(x)); }
inline void store(BFloat16 *to, float x) { // to nearest, ties to even; NaN stays NaN
    uint32_t bits = bits_as<uint32_t>(x);
    uint16_t rounded = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    to->bits = x != x ? uint16_t(0x7fc0) : rounded;
}

// What a format's values are, as qsim_core.numerics.Steps has it.
struct Grid {
    float low, high; // the lowest and the highest value
    float overflow;  // what lies beyond becomes ± this; equal to `high` where the format saturates
    float bound;     // no |x| is looked at beyond this
    float smallest;  // the power of two below which the step does not shrink any more
    float magic;     // times a power of two: adding it leaves the sum no bits below that binade's step
    int32_t fixed;   // one step for all values
    int32_t signed_zero;
};

// Rows that a thread takes at a time: some 64 KiB.
inline int64_t grain(int64_t columns) { return columns < 16384 ? 16384 / columns : 1; }

inline float clamp(float x, float low, float high) { // NaN stays
    x = x < low ? low : x;
    return x > high ? high : x;
}

template <bool fixed> inline float magic_of(float x, const Grid &grid) {
    if (fixed) return grid.smallest * grid.magic;
    float binade = bits_as<float>(bits_as<uint32_t>(x) & 0x7f800000u);
    return (binade < grid.smallest ? grid.smallest : binade) * grid.magic;
}

template <bool fixed> inline float nearest(float x, const Grid &grid) {
    float magic = magic_of<fixed>(x, grid), rounded = (x + magic) - magic;
    return grid.signed_zero ? std::copysign(rounded, x) : rounded + 0.0f;
}

// How the range of a block becomes its scale: `Scheme._covering` and `Scheme._rounded`.
struct Scaling {
    int32_t rule;        // 0: given; 1: divided by `reach`; 2 to 5: a power of two: floor, ceil, even, rceil
    int32_t rounding;    // of the scale, 0: none, 1: bfloat16, 2: E8M0, which holds powers of two, 3: `grid`
    int32_t zero_points; // 0: symmetric
    int32_t magnitude;   // of both signs: the range is that of magnitudes
    int32_t absmax;      // as far to either side, where there is a zero point
    float reach;         // the highest magnitude becomes this; with zero points the number of steps
    float largest;       // the element's largest value, and the exponent of it
    int32_t top;
    double tie;          // from this fraction on, of 0.5 to 1, rule `even` takes the next power
    float limit;         // a scale saturates here
    float second;        // scales have a scale of their own, one for all; 1: they have none
    Grid grid;
};

struct Task {
    int64_t rows, columns, block;
    float *scale; // [rows, blocks] by these strides: given, or to be written
    int64_t scale_row, scale_block;
    float *zero;     // null: none; else by the strides of the scales
    float shift;     // codes are stored less this
    int64_t out_row; // elements from one row of the result to the next
    int32_t threads;
    int32_t saturate; // under a scale what is too large saturates, whatever the format does by itself
    Scaling scaling;
};

// The bits of floats in an order of integers: NaN comes after Inf, so that it is not lost on the way.
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
    *low = number ? a : NAN;
    *high = number ? b : NAN;
}

// A power of two that a rule makes of the highest magnitude, at most one away from it: numerics.power_of_two_scale.
inline float power_of_two(float high, const Scaling &scaling) {
    float value = scaling.rule == 5 ? high / scaling.largest : high;
    if (!(std::fabs(high) <= FLT_MAX)) return NAN;
    int exponent = -149;
    if (value > 0) {
        double wide = value; // no float32 is subnormal in float64
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

inline float rounded_scale(float exact, const Scaling &scaling) {
    if (scaling.rounding == 0) return exact;
    float x = exact > scaling.limit ? scaling.limit : exact;
    if (scaling.rounding == 1) {
        BFloat16 half;
        store(&half, x);
        return finite(load(half));
    }
    if (scaling.rounding == 2) return x < 0x1p-127f ? 0x1p-127f : x;
    x = clamp(x / (scaling.second == 0 ? 1.0f : scaling.second), scaling.grid.low, scaling.grid.high);
    float units = scaling.grid.fixed ? nearest<true>(x, scaling.grid) : nearest<false>(x, scaling.grid);
    return finite(units * scaling.second);
}

template <class In> inline float scale_of(int64_t length, const In *x, const Scaling &scaling, const Grid &grid, float *zero) {
    float low = 0, high;
    extremes_of<In>(length, x, scaling.magnitude, &low, &high);
    if (!scaling.zero_points) {
        high = high <= 0 ? 0 : high; // never -0
        return rounded_scale(scaling.rule == 1 ? finite(high / scaling.reach) : power_of_two(high, scaling), scaling);
    }
    if (scaling.absmax) {
        high = std::fabs(low) > std::fabs(high) ? std::fabs(low) : std::fabs(high);
        low = -high;
    }
    low = low > 0 ? 0 : low;
    high = high < 0 ? 0 : high;
    float exact = (high - low) / scaling.reach;
    if (std::isinf(exact)) exact = high / scaling.reach - low / scaling.reach; // the difference overflowed
    float scale = rounded_scale(finite(exact), scaling);
    *zero = clamp(grid.low - std::nearbyint(low / (scale == 0 ? 1.0f : scale)), grid.low, grid.high);
    return scale;
}

// A block in units of its scale, rounded; less the zero point, where there is one. `length` first, so that the
// compiler knows the usual ones.
template <class In, class Out, bool fixed>
inline void round_block(int64_t length, const In *x, Out *y, float scale, float zero, const Task &task, const Grid &grid) {
    constexpr bool codes = sizeof(Out) == 1;
    float divisor = scale == 0 ? 1.0f : scale;
    if (fixed && (task.zero || codes)) {
        float low = grid.low - zero, high = grid.high - zero, offset = zero - task.shift;
        for (int64_t i = 0; i < length; i++) {
            float units = nearest<fixed>(clamp(load(x[i]) / divisor, low, high), grid);
            store(y + i, codes ? units + offset : units * scale);
        }
    } else if (task.saturate) {
        for (int64_t i = 0; i < length; i++)
            store(y + i, nearest<fixed>(clamp(load(x[i]) / divisor, grid.low, grid.high), grid) * scale);
    } else {
        float low = grid.low < 0 ? -grid.bound : grid.low, past = grid.low < 0 ? -grid.overflow : grid.low;
        for (int64_t i = 0; i < length; i++) {
            float value = nearest<fixed>(clamp(load(x[i]), low, grid.bound), grid);
            value = value > grid.high ? grid.overflow : value;
            store(y + i, value < grid.low ? past : value);
        }
    }
}

template <class In, class Out, bool fixed>
inline void block_at(int64_t length, const In *x, Out *y, float *scale, float *zero, const Task &task, const Grid &grid) {
    if (task.scaling.rule) *scale = scale_of<In>(length, x, task.scaling, grid, zero);
    round_block<In, Out, fixed>(length, x, y, *scale, zero ? *zero : 0.0f, task, grid);
}

template <class In, class Out, bool fixed> void round_rows(const In *x, Out *y, const Task &task, const Grid &grid) {
#pragma omp parallel for num_threads(task.threads) schedule(dynamic, grain(task.columns))
    for (int64_t row = 0; row < task.rows; row++) {
        for (int64_t start = 0, block = 0; start < task.columns; start += task.block, block++) {
            int64_t left = task.columns - start, length = left < task.block ? left : task.block;
            int64_t place = row * task.scale_row + block * task.scale_block;
            const In *from = x + row * task.columns + start;
            Out *to = y + row * task.out_row + start;
            float *scale = task.scale + place, *zero = task.zero ? task.zero + place : nullptr;
            if (length == 16) block_at<In, Out, fixed>(16, from, to, scale, zero, task, grid);
            else if (length == 32) block_at<In, Out, fixed>(32, from, to, scale, zero, task, grid);
            else if (length == 64) block_at<In, Out, fixed>(64, from, to, scale, zero, task, grid);
            else block_at<In, Out, fixed>(length, from, to, scale, zero, task, grid);
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
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t b = 0; b < blocks; b++) {
            int64_t left = columns - b * block, length = left < block ? left : block;
            const In *from = x + row * columns + b * block;
            float *lowest = low ? low + row * blocks + b : nullptr, *highest = high + row * blocks + b;
            if (length == 16) extremes_of<In>(16, from, !low, lowest, highest);
            else if (length == 32) extremes_of<In>(32, from, !low, lowest, highest);
            else if (length == 64) extremes_of<In>(64, from, !low, lowest, highest);
            else extremes_of<In>(length, from, !low, lowest, highest);
        }
    }
}

} // namespace

extern "C" {

// The lowest and the highest value of each block; with `low` null, the highest magnitude. A block with NaN gives NaN.
void extremes(const void *x, int32_t bfloat16, int64_t rows, int64_t columns, int64_t block, float *low, float *high,
              int32_t threads) {
    if (bfloat16) extremes_rows((const BFloat16 *)x, rows, columns, block, low, high, threads);
    else extremes_rows((const float *)x, rows, columns, block, low, high, threads);
}

// x rounded under its scales, as values in float32 (kind 0) or bfloat16 (1), or as codes in int8 (2).
void round_to_grid(const void *x, int32_t bfloat16, void *y, int32_t kind, const Task *task, const Grid *grid) {
    auto from = [&](auto *typed) {
        if (kind == 0) round_as(typed, (float *)y, *task, *grid);
        else if (kind == 1) round_as(typed, (BFloat16 *)y, *task, *grid);
        else round_rows<std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>, int8_t, true>(typed, (int8_t *)y, *task, *grid);
    };
    if (bfloat16) from((const BFloat16 *)x);
    else from((const float *)x);
}

// Integer sums [rows, columns] to float32, where they stand: (sum - row_zero (column_sum) - column_zero (row_sum)) times
// the row's and the column's scale, plus the bias, all of it in float64 with one rounding. Null: no zeros, no bias.
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
