// Exact sums of products of 8-bit codes, by the instructions that this processor has for them.
//
// A structure below multiplies the codes of some rows, which are unsigned, by those of vectors of columns, `group`
// successive codes at a time. Each lane of a vector is one column. A row's codes are counted from the lowest one; the
// sums of the columns' codes, times `less`, take that off again. A `Part` is the running sum of one piece, which `end`
// adds to a total in int32. All additions are modulo a power of two, so only the last sum of a piece has to fit.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

template <class To> inline To read(const void *from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

template <int bytes> struct Lanes;
template <> struct Lanes<16> {
    typedef int32_t Integers __attribute__((vector_size(16)));
    typedef float Floats __attribute__((vector_size(16)));
};
template <> struct Lanes<32> {
    typedef int32_t Integers __attribute__((vector_size(32)));
    typedef float Floats __attribute__((vector_size(32)));
};
template <> struct Lanes<64> {
    typedef int32_t Integers __attribute__((vector_size(64)));
    typedef float Floats __attribute__((vector_size(64)));
};

// Vectors of `bytes` bytes, which add up in 32 bits. `Vector` is the processor's own type of them,
// and `codes` the codes of a group.
template <int bytes, class Vector, int codes> struct Sums {
    static constexpr int lanes = bytes / 4, rows = 6, group = codes;
    static constexpr int shift = 0;      // subtracted from the unsigned codes of a row before they are multiplied
    static constexpr bool pairs = false; // true: the sums of a piece are two of 16 bits, one for each half of a group
    static constexpr bool twice = false; // true: two groups at a time are faster
    using Code = uint8_t;                // the type in which rows are read
    using Integers = typename Lanes<bytes>::Integers;
    using Floats = typename Lanes<bytes>::Floats;
    using Part = Vector;
    using Columns = Vector;
    using Row = Vector;
    static Part begin(const int32_t *sums, int32_t less) { return Part(read<Integers>(sums) * less); }
    static Integers end(Part part) { return Integers(part); }
};

// Plain C++, for any processor.
struct PortableDot : Sums<32, Lanes<32>::Integers, 4> {
    static constexpr int rows = 2, vectors = 2;
    using Row = uint32_t;
    static Columns columns(const int8_t *w) { return read<Columns>(w); }
    static Row row(const uint8_t *x) { return read<uint32_t>(x); }
    static Part add(Part part, Row x, Columns w) {
        int8_t codes[32];
        std::memcpy(codes, &w, sizeof codes);
        for (int lane = 0; lane < 8; lane++)
            for (int k = 0; k < 4; k++) part[lane] += int32_t(x >> 8 * k & 255) * codes[4 * lane + k];
        return part;
    }
};

#if defined(__AVX512VNNI__)
struct Dot : Sums<64, __m512i, 4> {
    static constexpr int vectors = 4;
    static Columns columns(const int8_t *w) { return _mm512_loadu_si512(w); }
    static Row row(const uint8_t *x) { return _mm512_set1_epi32(read<int32_t>(x)); }
    static Part add(Part part, Row x, Columns w) { return _mm512_dpbusd_epi32(part, x, w); }
};
using WideDot = Dot;
#elif defined(__AVXVNNI__)
struct Dot : Sums<32, __m256i, 4> {
    static constexpr int vectors = 2;
    static Columns columns(const int8_t *w) { return _mm256_loadu_si256((const __m256i *)w); }
    static Row row(const uint8_t *x) { return _mm256_set1_epi32(read<int32_t>(x)); }
    static Part add(Part part, Row x, Columns w) { return _mm256_dpbusd_avx_epi32(part, x, w); }
};
using WideDot = Dot;
#elif defined(__AVX2__)
// Keep a value in a register: the compiler would read it from memory again for each use.
inline __m256i held(__m256i x) {
    asm("" : "+x"(x));
    return x;
}

// 16-bit sums: the codes have to be small.
struct Dot : Sums<32, __m256i, 4> {
    static constexpr int vectors = 2;
    static constexpr bool pairs = true, twice = true;
    static Columns columns(const int8_t *w) { return held(_mm256_loadu_si256((const __m256i *)w)); }
    static Row row(const uint8_t *x) { return _mm256_set1_epi32(read<int32_t>(x)); }
    static Part begin(const int32_t *sums, int32_t less) {
        return _mm256_mullo_epi16(_mm256_loadu_si256((const __m256i *)sums), _mm256_set1_epi16(int16_t(less)));
    }
    static Part add(Part part, Row x, Columns w) { return held(_mm256_add_epi16(part, held(_mm256_maddubs_epi16(x, w)))); }
    static Integers end(Part part) {
        __m256i ones; // made here: a part needs the register before
        asm volatile("vpcmpeqw %0, %0, %0\n\tvpsrlw $15, %0, %0" : "=x"(ones));
        return Integers(_mm256_madd_epi16(part, ones));
    }
};

// Codes of 8 bits on both sides. Rows are read as 16-bit integers.
struct WideDot : Sums<32, __m256i, 2> {
    static constexpr int vectors = 2;
    using Code = uint16_t;
    static Columns columns(const int8_t *w) {
        return held(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)));
    }
    static Row row(const uint16_t *x) { return _mm256_set1_epi32(read<int32_t>(x)); }
    static Part add(Part part, Row x, Columns w) { return held(_mm256_add_epi32(part, held(_mm256_madd_epi16(x, w)))); }
};
#elif defined(__ARM_FEATURE_DOTPROD)
struct Dot : Sums<16, int32x4_t, 4> {
    static constexpr int vectors = 4, shift = 128;
    using Columns = int8x16_t;
    using Row = int8x16_t;
    static Columns columns(const int8_t *w) { return vld1q_s8(w); }
    static Row row(const uint8_t *x) { return vreinterpretq_s8_u32(vdupq_n_u32(read<uint32_t>(x) ^ 0x80808080u)); }
    static Part add(Part part, Row x, Columns w) { return vdotq_s32(part, x, w); }
};
using WideDot = Dot;
#else
using Dot = PortableDot;
using WideDot = PortableDot;
#endif

} // namespace
