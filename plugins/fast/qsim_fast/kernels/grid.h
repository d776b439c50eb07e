// Rounding to the values of a number format, for every kernel. Include it once in a source, outside any namespace.
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

// The values of a number format: qsim_core.formats.rounding.Steps.
struct Grid {
    float low, high; // the lowest and the highest value
    float overflow;  // a value beyond becomes ± this; equal to `high` if the format saturates
    float bound;     // magnitudes are clamped to this first
    float smallest;  // the power of two below which the step stays the same
    float magic;     // times a power of two: adding it drops the bits below the step of that binade
    int32_t fixed;   // 1: one step for all values
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
