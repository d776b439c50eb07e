// Sums in narrow floats: qsim_accumulators.floats, with the same bits as the reference in Python.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t lanes = 16;
constexpr int64_t deepest = 64;
constexpr uint64_t exponent_bits = 0x7FF0000000000000;

enum Kind : int32_t { float32, even, zero, away };

// Rounding to a format: qsim_accumulators.float_kernels.Rule has the same fields.
struct Rule {
    double low, high, bound, below, above, smallest, step, zero;
    int32_t kind;
};

inline double of_bits(uint64_t bits) {
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint64_t bits_of(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline double clamp(double x, double low, double high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

// a + b, rounded to odd: the last bit is 1 if the sum is not exact.
inline double odd_sum(double a, double b) {
    double total = a + b, other = total - a, error = (a - (total - other)) + (b - other);
    uint64_t bits = bits_of(total);
    uint64_t toward = (error > 0) == (total > 0) ? bits + 1 : bits - 1;
    bool inexact = error != 0 && bits % 2 == 0 && std::fabs(total) < INFINITY;
    return of_bits(inexact ? toward : bits);
}

template <Kind kind> inline double rounded(double x, const Rule &rule) {
    double inside = clamp(x, -rule.bound, rule.bound);
    double binade = of_bits(bits_of(inside) & exponent_bits);
    double step = (binade > rule.smallest ? binade : rule.smallest) * rule.step, magic = step * 0x1.8p52;
    double found = (inside + magic) - magic;
    double outward = std::copysign(step, inside), size = std::fabs(inside);
    if (kind == zero) found = std::fabs(found) > size ? found - outward : found;
    if (kind == away) found = std::fabs(inside - found) * 2 == step && std::fabs(found) < size ? found + outward : found;
    found = std::copysign(found, inside);
    if (kind == zero) found = std::fabs(x) < INFINITY ? clamp(found, rule.low, rule.high) : found;
    return (found > rule.high ? rule.above : found < rule.low ? rule.below : found) + rule.zero;
}

template <Kind kind> inline void round_all(double *x, const Rule &rule) {
    for (int64_t l = 0; l < lanes; l++) x[l] = kind == float32 ? (double)(float)x[l] : rounded<kind>(x[l], rule);
}

inline void round_to(const Rule &rule, double *x) {
    switch (rule.kind) {
    case float32: return round_all<float32>(x, rule);
    case even: return round_all<even>(x, rule);
    case zero: return round_all<zero>(x, rule);
    default: return round_all<away>(x, rule);
    }
}

// Add terms to sums, or begin with them, and round.
inline void add(double *sum, const double *term, bool begins, const Rule &rule) {
    if (begins) std::memcpy(sum, term, lanes * sizeof *sum);
    else
        for (int64_t l = 0; l < lanes; l++) sum[l] = odd_sum(sum[l], term[l]);
    round_to(rule, sum);
}

struct Products {
    const double *x, *w;
    const Rule *rule;

    inline void give(int64_t k, double *term) const {
        for (int64_t l = 0; l < lanes; l++) term[l] = x[k] * w[k * lanes + l];
        if (rule) round_to(*rule, term);
    }
};

void in_chunks(const Products &products, double *total, int64_t length, int64_t chunk, const Rule &rule, const Rule &outer) {
    for (int64_t first = 0; first < length; first += chunk) {
        double sum[lanes], term[lanes];
        int64_t last = first + chunk < length ? first + chunk : length;
        for (int64_t k = first; k < last; k++) {
            products.give(k, term);
            add(sum, term, k == first, rule);
        }
        add(total, sum, first == 0, outer);
    }
}

// Sums of 1, 2, 4, … neighbours wait at their levels for the next one. What is left is added up from the last one on.
void in_tree(const Products &products, double *total, int64_t length, const Rule &rule) {
    double waiting[deepest][lanes];
    for (int64_t k = 0; k < length; k++) {
        double sum[lanes];
        products.give(k, sum);
        round_to(rule, sum);
        int64_t level = 0;
        for (; k >> level & 1; level++) add(sum, waiting[level], false, rule);
        std::memcpy(waiting[level], sum, sizeof sum);
    }
    bool begins = true;
    for (int64_t level = 0; level < deepest; level++)
        if (length >> level & 1) {
            if (begins) std::memcpy(total, waiting[level], sizeof waiting[level]);
            else add(total, waiting[level], false, rule);
            begins = false;
        }
}

} // namespace

extern "C" {
// Rows [rows, length] and panels of right rows [columns / lanes, length, lanes] to sums [rows, columns], in chunks of
// `chunk` products, or in a tree if that is 0. `single` rounds each product, if it is given.
void float_sums(const double *left, const double *right, double *sums, const Rule *single, const Rule *rule, const Rule *outer,
                int64_t rows, int64_t columns, int64_t length, int64_t chunk, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t panel = 0; panel < columns / lanes; panel++)
        for (int64_t row = 0; row < rows; row++) {
            Products products{left + row * length, right + panel * length * lanes, single};
            double *total = sums + row * columns + panel * lanes;
            if (chunk) in_chunks(products, total, length, chunk, *rule, *outer);
            else in_tree(products, total, length, *rule);
        }
}
}
