// Sixteen floats at a time, in the compiler's own vector types: any instruction set will do.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

template <class V, class P>
inline V load_as(const P *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline f32x16 load16(const float *p) { return load_as<f32x16>(p); }
inline f32x16 load16(const bf16 *p) {
    return (f32x16)(__builtin_convertvector(load_as<u16x16>(p), u32x16) << 16);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    return load_as<float>(&bits);
}

inline void store16(float *p, f32x16 v) { std::memcpy(p, &v, sizeof v); }
inline void store16(bf16 *p, f32x16 v) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
#else
    const u32x16 bits = (u32x16)v;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u32x16 nan = (u32x16)(v != v);
    rounded = (rounded & ~nan) | (nan & 0x7fc0);
    const u16x16 narrow = __builtin_convertvector(rounded, u16x16);
#endif
    std::memcpy(p, &narrow, sizeof narrow);
}

inline void store(float *p, float x) { *p = x; }
inline void store(bf16 *p, float x) {
    uint32_t bits = load_as<uint32_t>(&x);
    p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Thirty-two values as two vectors, split as is cheapest: products of two rows do not care in what
// order they are taken, as long as it is the same for both.
inline f32x16 load_first(const float *p) { return load16(p); }
inline f32x16 load_second(const float *p) { return load16(p + 16); }
inline f32x16 load_first(const bf16 *p) { return (f32x16)(load_as<u32x16>(p) << 16); }
inline f32x16 load_second(const bf16 *p) { return (f32x16)(load_as<u32x16>(p) & 0xffff0000u); }

inline float sum(f32x16 v) {
    typedef float f32x8 __attribute__((vector_size(32)));
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x8 halves[2];
    std::memcpy(halves, &v, sizeof v);
    const f32x8 eight = halves[0] + halves[1];
    f32x4 quarters[2];
    std::memcpy(quarters, &eight, sizeof eight);
    const f32x4 four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// The lanes of a (0 to 15) and b (16 to 31) in this order.
inline f32x16 shuffled(f32x16 a, f32x16 b, i32x16 order) {
#if defined(__clang__)
    f32x16 v;
    for (int i = 0; i < 16; ++i) v[i] = order[i] < 16 ? a[order[i]] : b[order[i] - 16];
    return v;
#else
    return __builtin_shuffle(a, b, order);
#endif
}

// Four vectors' sums as four lanes each: lanes 4i to 4i + 3 of the result add up to the sum of v[i].
inline f32x16 fold4(const f32x16 (&v)[4]) {
    const auto halves = [](f32x16 a, f32x16 b) {
        const i32x16 low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
        return shuffled(a, b, low) + shuffled(a, b, low + 8);
    };
    const f32x16 ab = halves(v[0], v[1]), cd = halves(v[2], v[3]);
    const i32x16 low = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    return shuffled(ab, cd, low) + shuffled(ab, cd, low + 4);
}

// The sums of four vectors, each in the order of `sum`.
inline void sum4(const f32x16 (&v)[4], float *out) {
    f32x16 abcd = fold4(v);
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    abcd += shuffled(abcd, abcd, lanes ^ 2);
    abcd += shuffled(abcd, abcd, lanes ^ 1);
    for (int i = 0; i < 4; ++i) out[i] = abcd[4 * i];
}

// The sums of sixteen vectors: folded[i] is the fold4 of vectors i, 4 + i, 8 + i and 12 + i.
inline f32x16 sum16(const f32x16 (&folded)[4]) {
    const i32x16 low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    const auto pairs = [&](f32x16 a, f32x16 b) {  // lanes a0 + a2, b0 + b2, a1 + a3, b1 + b3 of four
        return shuffled(a, b, low) + shuffled(a, b, low + 2);
    };
    const f32x16 a = pairs(folded[0], folded[1]), b = pairs(folded[2], folded[3]);
    const i32x16 first = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    return shuffled(a, b, first) + shuffled(a, b, first + 2);
}

inline f32x16 splat(float x) { return x - f32x16{}; }

inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

inline float largest_lane(f32x16 v) {
    typedef float f32x8 __attribute__((vector_size(32)));
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x8 halves[2];
    std::memcpy(halves, &v, sizeof v);
    const f32x8 eight = halves[0] > halves[1] ? halves[0] : halves[1];
    f32x4 quarters[2];
    std::memcpy(quarters, &eight, sizeof eight);
    const f32x4 four = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
    const float even = four[0] > four[2] ? four[0] : four[2];
    const float odd = four[1] > four[3] ? four[1] : four[3];
    return even > odd ? even : odd;
}

// e^x within 2 ulp for x <= 0; 0 below -87. Cephes' polynomial after reduction by ln 2.
inline f32x16 exp16(f32x16 x) {
    const f32x16 clamped = larger(x, splat(-87.0f));
    const f32x16 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const f32x16 n = (clamped * 1.44269504088896341f + shift) - shift;
    const f32x16 r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    f32x16 y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const i32x16 exponent = __builtin_convertvector(n, i32x16) << 23;
    y = (f32x16)((i32x16)y + exponent);
    return x < -87.0f ? f32x16{} : y;
}

// 2^x within 2e-7 of it, for x <= 0 or little above; 0 below -126. A minimax polynomial.
inline f32x16 power_of_two16(f32x16 x) {
    const f32x16 shifted = larger(x, splat(-126.0f)) + 12582912.0f;  // an integer in its last bits
    const f32x16 r = larger(x, splat(-126.0f)) - (shifted - 12582912.0f);
    f32x16 y = splat(1.3276471519e-3f);
    y = y * r + 9.6755413307e-3f;
    y = y * r + 5.5507132750e-2f;
    y = y * r + 2.4022119724e-1f;
    y = y * r + 6.9314696706e-1f;
    y = y * r + 1.0f;
    y = (f32x16)((i32x16)y + ((i32x16)shifted << 23));
    return x < -126.0f ? f32x16{} : y;
}

template <class T>
inline float mean_square(const T *x, int64_t n) {
    f32x16 sums = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const f32x16 v = load16(x + i);
        sums += v * v;
    }
    float total = sum(sums);
    for (; i < n; ++i) total += to_float(x[i]) * to_float(x[i]);
    return total / float(n);
}
