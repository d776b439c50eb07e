// GPTQ's error feedback over a run of columns, one after another. Results are those of the loop in Python, except for
// ties after sums that were taken in another order.
#include "grid.h"

namespace {

// One value of each row, each under its own scale, and what this changes.
template <bool fixed>
inline void round_column(int64_t length, const float *__restrict x, const float *__restrict start, float *__restrict y,
                         float *__restrict change, const float *__restrict scales, const float *__restrict zeros, const Grid grid) {
    for (int64_t c = 0; c < length; c++) {
        float scale = scales[c], divisor = scale == 0 ? 1.0f : scale, zero = zeros ? zeros[c] : 0.0f;
        float value = nearest<fixed>(clamp(x[c] / divisor, grid.low - zero, grid.high - zero), grid) * scale;
        y[c] = value;
        change[c] = start[c] - value;
    }
}

} // namespace

extern "C" {
// A run of columns of a matrix, each after what the rounding of those before it has changed is made up for. A column is
// a row here, [count, width] all: `moved` has what came before the run. Row g of `scales`, and of `zeros` if it is not
// null, is that of the columns of group g; `shares` [count, count] has its own strides.
void feed_back(const float *start, float *moved, float *change, float *rounded, const float *shares, int64_t share_row,
               int64_t share_column, int64_t count, int64_t width, const float *scales, const float *zeros, const int64_t *groups,
               const Grid *given, int32_t threads) {
    const Grid grid = *given;
    const int64_t part = 256;
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < width; first += part) {
        int64_t length = width - first < part ? width - first : part;
        for (int64_t place = 0; place < count; place++) {
            int64_t at = place * width + first, own = groups[place] * width + first;
            float *__restrict now = moved + at;
            for (int64_t i = 0; i < place; i++) {
                float share = shares[place * share_row + i * share_column];
                const float *__restrict before = change + i * width + first;
                for (int64_t c = 0; c < length; c++) now[c] += share * before[c];
            }
            if (grid.fixed) round_column<true>(length, now, start + at, rounded + at, change + at, scales + own, zeros ? zeros + own : nullptr, grid);
            else round_column<false>(length, now, start + at, rounded + at, change + at, scales + own, zeros ? zeros + own : nullptr, grid);
        }
    }
}
}
