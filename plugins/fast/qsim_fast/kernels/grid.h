// Rounding to the values of a format: what every kernel shares. Included inside no namespace, once in a source.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// The values of a format, as qsim_core.formats.rounding.Steps has them.
struct Grid {
    float low, high; // the lowest and the highest value
    float overflow;  // what lies beyond becomes ± this; equal to `high` where the format saturates
    float bound;     // no |x| is looked at beyond this
    float smallest;  // the power of two below which the step does not shrink any more
    float magic;     // times a power of two: adding it leaves the sum no bits below that binade's step
    int32_t fixed;   // one step for all values
    int32_t signed_zero;
};

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

} // namespace
