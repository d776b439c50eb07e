// Sums in narrow floats: qsim_accumulators.floats, with the same bits as the reference in Python.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t lanes = 16;
constexpr int64_t deepest = 64;
constexpr uint64_t exponent_bits = 0x7FF0000000000000;

enum Kind : int32_t { float32, even, zero, away, stochastic };

// Rounding to a format: qsim_accumulators.float_kernels.Rule has the same fields.
struct Rule {
    double low, high, bound, below, above, smallest, step, zero;
    int32_t kind;
    uint64_t seed;
};

// The place of random numbers: the elements of the result, the number of the first one, and two words of the counter.
// qsim_accumulators.float_kernels.Draws has the same fields.
struct Draws {
    uint64_t size, first;
    uint32_t step, site;

    // Numbers in [0, 1) for `lanes` neighbours in the result, as qsim_core.formats.random_bits draws them: element
    // `place` of the tensor that is rounded in call `call`.
    void draw(float *number, uint64_t place, uint64_t call, uint64_t seed) const {
        constexpr int64_t blocks = lanes / 4 + 1;
        const uint64_t index = size * call + first + place;
        uint32_t c0[blocks], c1[blocks], c2[blocks], c3[blocks], words[4 * blocks];
        for (int64_t b = 0; b < blocks; b++) {
            uint64_t block = index / 4 + b;
            c0[b] = (uint32_t)block, c1[b] = block >> 32, c2[b] = step, c3[b] = site;
        }
        uint32_t k0 = (uint32_t)seed, k1 = seed >> 32;
        for (int64_t round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85)
            for (int64_t b = 0; b < blocks; b++) {
                uint64_t p0 = 0xD2511F53ull * c0[b], p1 = 0xCD9E8D57ull * c2[b];
                c0[b] = (uint32_t)(p1 >> 32) ^ c1[b] ^ k0, c1[b] = (uint32_t)p1;
                c2[b] = (uint32_t)(p0 >> 32) ^ c3[b] ^ k1, c3[b] = (uint32_t)p0;
            }
        for (int64_t b = 0; b < blocks; b++)
            words[4 * b] = c0[b], words[4 * b + 1] = c1[b], words[4 * b + 2] = c2[b], words[4 * b + 3] = c3[b];
        for (int64_t l = 0; l < lanes; l++) number[l] = (float)(words[index % 4 + l] >> 8) * 0x1p-24f;
    }
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

template <Kind kind> inline double rounded(double x, const Rule &rule, float number) {
    double inside = clamp(x, -rule.bound, rule.bound);
    double binade = of_bits(bits_of(inside) & exponent_bits);
    double step = (binade > rule.smallest ? binade : rule.smallest) * rule.step, magic = step * 0x1.8p52;
    double found = (inside + magic) - magic;
    double outward = std::copysign(step, inside), size = std::fabs(inside);
    if (kind == zero) found = std::fabs(found) > size ? found - outward : found;
    if (kind == away) found = std::fabs(inside - found) * 2 == step && std::fabs(found) < size ? found + outward : found;
    if (kind == stochastic) {
        double below = std::floor(inside / step);
        found = (below + (number < inside / step - below)) * step;
    }
    found = std::copysign(found, inside);
    if (kind == zero) found = std::fabs(x) < INFINITY ? clamp(found, rule.low, rule.high) : found;
    return (found > rule.high ? rule.above : found < rule.low ? rule.below : found) + rule.zero;
}

template <Kind kind> inline void round_all(double *x, const Rule &rule, const float *number) {
    for (int64_t l = 0; l < lanes; l++) x[l] = kind == float32 ? (double)(float)x[l] : rounded<kind>(x[l], rule, number[l]);
}

// Neighbours in a row of the result.
struct Place {
    const Draws *draws;
    uint64_t element;

    // Round in the call of this number.
    void round(const Rule &rule, double *x, uint64_t call) const {
        float number[lanes] = {};
        switch (rule.kind) {
        case float32: return round_all<float32>(x, rule, number);
        case even: return round_all<even>(x, rule, number);
        case zero: return round_all<zero>(x, rule, number);
        case away: return round_all<away>(x, rule, number);
        default: draws->draw(number, element, call, rule.seed); return round_all<stochastic>(x, rule, number);
        }
    }

    // Add terms to sums, or begin with them, and round.
    void add(double *sum, const double *term, bool begins, const Rule &rule, uint64_t call) const {
        if (begins) std::memcpy(sum, term, lanes * sizeof *sum);
        else
            for (int64_t l = 0; l < lanes; l++) sum[l] = odd_sum(sum[l], term[l]);
        round(rule, sum, call);
    }
};

struct Products {
    const double *x, *w;
    const Rule *rule;
    Place place;

    void give(int64_t k, double *term, uint64_t call) const {
        for (int64_t l = 0; l < lanes; l++) term[l] = x[k] * w[k * lanes + l];
        if (rule) place.round(*rule, term, call);
    }
};

// Without `outer` all products are one chunk: each is followed by its sum. Else the products of a chunk come first.
void in_chunks(const Products &products, double *total, int64_t length, int64_t chunk, const Rule &rule, const Rule *outer) {
    const Place &place = products.place;
    const int64_t own = products.rule != nullptr;
    uint64_t call = 0;
    for (int64_t first = 0; first < length; first += chunk) {
        double sum[lanes], term[lanes];
        int64_t last = first + chunk < length ? first + chunk : length, count = last - first;
        for (int64_t k = first; k < last; k++) {
            int64_t at = k - first;
            products.give(k, term, call + (outer ? at : at * (1 + own)));
            place.add(sum, term, k == first, rule, call + (outer ? count * own + at : at * (1 + own) + own));
        }
        call += count * (1 + own);
        if (outer) place.add(total, sum, first == 0, *outer, call++);
        else std::memcpy(total, sum, sizeof sum);
    }
}

// Sums of 1, 2, 4, … neighbours wait at their levels for the next one. What is left is added up from the last one on.
// Calls are counted level by level.
void in_tree(const Products &products, double *total, int64_t length, const Rule &rule) {
    const Place &place = products.place;
    const int64_t own = products.rule != nullptr;
    uint64_t calls[deepest], before = length * (1 + own);
    for (int64_t level = 0, count = length; level < deepest; level++, count = count / 2 + count % 2)
        calls[level] = before, before += count / 2;
    double waiting[deepest][lanes];
    for (int64_t k = 0; k < length; k++) {
        double sum[lanes];
        products.give(k, sum, k * (1 + own));
        place.round(rule, sum, k * (1 + own) + own);
        int64_t level = 0;
        for (; k >> level & 1; level++) place.add(sum, waiting[level], false, rule, calls[level] + (k >> (level + 1)));
        std::memcpy(waiting[level], sum, sizeof sum);
    }
    bool begins = true;
    for (int64_t level = 0; level < deepest; level++)
        if (length >> level & 1) {
            if (begins) std::memcpy(total, waiting[level], sizeof waiting[level]);
            else place.add(total, waiting[level], false, rule, calls[level] + (length >> level) / 2);
            begins = false;
        }
}

} // namespace

extern "C" {
// Rows [rows, length] and panels of right rows [columns / lanes, length, lanes] to sums [rows, columns], in chunks of
// `chunk` products, or in a tree if that is 0. The first `given` columns are those of the result. `single` rounds each product, if it is given.
void float_sums(const double *left, const double *right, double *sums, const Rule *single, const Rule *rule, const Rule *outer,
                const Draws *draws, int64_t rows, int64_t columns, int64_t given, int64_t length, int64_t chunk, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t panel = 0; panel < columns / lanes; panel++)
        for (int64_t row = 0; row < rows; row++) {
            Place place{draws, (uint64_t)(row * given + panel * lanes)};
            Products products{left + row * length, right + panel * length * lanes, single, place};
            double *total = sums + row * columns + panel * lanes;
            if (chunk) in_chunks(products, total, length, chunk, *rule, outer);
            else in_tree(products, total, length, *rule);
        }
}
}
