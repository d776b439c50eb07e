// The fused dot product of qsim_accumulators.fused, with the same bits as the reference in Python.
#include <cmath>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr int64_t lanes = 16;
constexpr int32_t zero_exponent = -126, highest_exponent = 127, longest_shift = 31;

// The running sums of `lanes` columns: whole significands and exponents, and ±Inf once a sum is too large.
struct Sums {
    int32_t significand[lanes], exponent[lanes];
    float infinite[lanes];

    void clear() {
        for (int64_t l = 0; l < lanes; l++) significand[l] = 0, exponent[l] = zero_exponent, infinite[l] = 0;
    }

    float value(int64_t l, int32_t kept) const {
        return infinite[l] != 0 ? infinite[l] : std::ldexp((float)significand[l], exponent[l] - kept);
    }

    // Write the sum total · 2^(top - fraction) back, cut off toward zero at `kept` binary digits.
    void write(int64_t l, int64_t total, int32_t top, int32_t fraction, int32_t kept) {
        uint64_t magnitude = total < 0 ? -(uint64_t)total : (uint64_t)total;
        if (magnitude == 0) {
            significand[l] = 0, exponent[l] = zero_exponent;
            return;
        }
        int32_t found = top - fraction + 63 - __builtin_clzll(magnitude);
        if (found > highest_exponent) infinite[l] = total < 0 ? -INFINITY : INFINITY;
        int32_t e = found < zero_exponent ? zero_exponent : found, shift = top - fraction + kept - e;
        uint64_t cut = shift >= 0 ? magnitude << shift : shift > -64 ? magnitude >> -shift : 0;
        significand[l] = total < 0 ? -(int32_t)cut : (int32_t)cut;
        exponent[l] = cut ? e : zero_exponent;
    }
};

// trunc(x · 2^(fraction - top)) for x = significand · 2^(exponent - digits), with up and down = ±(fraction - digits).
inline int32_t aligned(int32_t significand, int32_t below, int32_t up, int32_t down) {
    uint32_t magnitude = (uint32_t)std::abs(significand) << up;
    int32_t shift = below + down;
    int32_t cut = (int32_t)(magnitude >> (shift > longest_shift ? longest_shift : shift));
    return significand < 0 ? -cut : cut;
}

} // namespace

extern "C" {
// Rows [rows, length] and panels of right rows [columns / lanes, length, lanes] to a product [rows, columns]. A term is
// below 2^(fraction + 2), so that 2^(29 - fraction) of them are added up in 32 bits.
void fused_products(const int32_t *left, const int32_t *left_exponent, const int32_t *right, const int32_t *right_exponent,
                    float *product, int64_t rows, int64_t columns, int64_t length, int64_t n, int32_t fraction,
                    int32_t digits, int32_t kept, int32_t threads) {
    const int32_t up = fraction > digits ? fraction - digits : 0, down = digits > fraction ? digits - fraction : 0;
    const int32_t sum_up = fraction > kept ? fraction - kept : 0, sum_down = kept > fraction ? kept - fraction : 0;
    const int64_t at_once = fraction < 29 ? (int64_t)1 << (29 - fraction) : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t panel = 0; panel < columns / lanes; panel++) {
        const int32_t *w = right + panel * length * lanes, *of_w = right_exponent + panel * length * lanes;
        for (int64_t row = 0; row < rows; row++) {
            const int32_t *x = left + row * length, *of_x = left_exponent + row * length;
            Sums sums;
            sums.clear();
            for (int64_t first = 0; first < length; first += n) {
                int32_t top[lanes];
                int64_t total[lanes];
                for (int64_t l = 0; l < lanes; l++) top[l] = sums.exponent[l];
                for (int64_t k = first; k < first + n; k++)
                    for (int64_t l = 0; l < lanes; l++) {
                        int32_t e = of_x[k] + of_w[k * lanes + l];
                        top[l] = e > top[l] ? e : top[l];
                    }
                for (int64_t l = 0; l < lanes; l++)
                    total[l] = aligned(sums.significand[l], top[l] - sums.exponent[l], sum_up, sum_down);
                for (int64_t begin = first; begin < first + n; begin += at_once) {
                    int64_t end = begin + at_once < first + n ? begin + at_once : first + n;
                    int32_t part[lanes] = {};
                    for (int64_t k = begin; k < end; k++)
                        for (int64_t l = 0; l < lanes; l++) {
                            int32_t below = top[l] - of_x[k] - of_w[k * lanes + l];
                            part[l] += aligned(x[k] * w[k * lanes + l], below, up, down);
                        }
                    for (int64_t l = 0; l < lanes; l++) total[l] += part[l];
                }
                for (int64_t l = 0; l < lanes; l++)
                    if (sums.infinite[l] == 0) sums.write(l, total[l], top[l], fraction, kept);
            }
            for (int64_t l = 0; l < lanes; l++) product[row * columns + panel * lanes + l] = sums.value(l, kept);
        }
    }
}
}
