// Sums of whole numbers that saturate: qsim_accumulators.integers, with the same results as the reference in Python.
#include <cstdint>

namespace {

constexpr int64_t lanes = 16;

inline int32_t clamp(int32_t x, int32_t low, int32_t high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

} // namespace

extern "C" {
// Rows [rows, length] and panels of right rows [columns / lanes, length, lanes] to sums [rows, columns]. After each
// `chunk` products the running sum is kept in ±`running`, and at last in ±`result`; each product in ±`single`. The
// lower end of a range is one more than its upper end. No sum of a chunk and a running sum needs more than 31 bits.
void saturating_products(const int32_t *left, const int32_t *right, float *product, int64_t rows, int64_t columns, int64_t length,
                         int64_t chunk, int32_t running, int32_t result, int32_t single, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t panel = 0; panel < columns / lanes; panel++) {
        const int32_t *w = right + panel * length * lanes;
        for (int64_t row = 0; row < rows; row++) {
            const int32_t *x = left + row * length;
            int32_t sum[lanes] = {};
            for (int64_t first = 0; first < length; first += chunk) {
                int64_t last = first + chunk < length ? first + chunk : length;
                for (int64_t k = first; k < last; k++)
                    for (int64_t l = 0; l < lanes; l++) sum[l] += clamp(x[k] * w[k * lanes + l], -single - 1, single);
                for (int64_t l = 0; l < lanes; l++) sum[l] = clamp(sum[l], -running - 1, running);
            }
            for (int64_t l = 0; l < lanes; l++)
                product[row * columns + panel * lanes + l] = (float)clamp(sum[l], -result - 1, result);
        }
    }
}
}
