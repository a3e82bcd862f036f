// Sixteen floats at a time.

#pragma once

#include "lanes.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

using f32x16 = Vector<float, 16>;
using i32x16 = Vector<int32_t, 16>;
using u32x16 = Vector<uint32_t, 16>;
using u16x16 = Vector<uint16_t, 16>;

struct bf16 {
    uint16_t bits;
};

inline f32x16 load16(const float *p) { return load_as<f32x16>(p); }
inline f32x16 load16(const bf16 *p) {
    return (f32x16)(converted<u32x16>(load_as<u16x16>(p)) << 16);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    return load_as<float>(&bits);
}

inline void store16(float *p, f32x16 v) { store_as(p, v); }
inline void store16(bf16 *p, f32x16 v) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
    store_as(p, (u16x16)_mm512_cvtneps_pbh((__m512)v));
#else
    const u32x16 bits = (u32x16)v;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u32x16 nan = (u32x16)(v != v);
    rounded = (rounded & ~nan) | (nan & 0x7fc0);
    store_as(p, converted<u16x16>(rounded));
#endif
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
    const auto eight = low_half(v) + high_half(v);
    const auto four = low_half(eight) + high_half(eight);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// Four vectors' sums as four lanes each: lanes 4i to 4i + 3 of the result add up to the sum of v[i].
template <class V>
inline V fold4(const V (&v)[4]) {
    const V ab = folded(v[0], v[1]), cd = folded(v[2], v[3]);
    if constexpr (IN_HALVES<V>) {
        return {folded(low_half(ab), high_half(ab)), folded(low_half(cd), high_half(cd))};
    } else {
        constexpr auto low = [](int i) { return i / 4 * 8 + i % 4; };
        constexpr auto high = [](int i) { return i / 4 * 8 + i % 4 + 4; };
        return shuffled<low>(ab, cd) + shuffled<high>(ab, cd);
    }
}

// The sums of four vectors, each in the order of `sum`.
inline void sum4(const f32x16 (&v)[4], float *out) {
    f32x16 abcd = fold4(v);
    abcd += picked<2, 3, 0, 1>(abcd, abcd);
    abcd += picked<1, 0, 3, 2>(abcd, abcd);
    for (int i = 0; i < 4; ++i) out[i] = abcd[4 * i];
}

// The sums of sixteen vectors: folded[i] is the fold4 of vectors i, 4 + i, 8 + i and 12 + i.
inline f32x16 sum16(const f32x16 (&folded)[4]) {
    const auto pairs = [](f32x16 a, f32x16 b) {  // lanes a0 + a2, b0 + b2, a1 + a3, b1 + b3 of four
        return picked<0, 4, 1, 5>(a, b) + picked<2, 6, 3, 7>(a, b);
    };
    const f32x16 a = pairs(folded[0], folded[1]), b = pairs(folded[2], folded[3]);
    return picked<0, 1, 4, 5>(a, b) + picked<2, 3, 6, 7>(a, b);
}

inline f32x16 splat(float x) { return filled<f32x16>(x); }
// 0 to 15.
inline i32x16 lane_numbers() {
    constexpr int32_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_as<i32x16>(numbers);
}

template <class V>
inline V larger(V a, V b) {
    return where(a > b, a, b);
}

template <class V>
inline Lane<V> largest_lane(V v) {
    const auto eight = larger(low_half(v), high_half(v));
    const auto four = larger(low_half(eight), high_half(eight));
    const auto even = four[0] > four[2] ? four[0] : four[2];
    const auto odd = four[1] > four[3] ? four[1] : four[3];
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
    const i32x16 exponent = converted<i32x16>(n) << 23;
    y = (f32x16)((i32x16)y + exponent);
    return where(x < -87.0f, f32x16{}, y);
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
    return where(x < -126.0f, f32x16{}, y);
}

inline void widen(const bf16 *from, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store16(to + i, load16(from + i));
    for (; i < n; ++i) to[i] = to_float(from[i]);
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
