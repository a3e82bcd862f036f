// Products of bf16 pairs: two values of k side by side, as vdpbf16ps takes them. Without that
// instruction a pair is two fp32 multiply-adds, in the same order.

#pragma once

#include "vec.h"

// Sums that are held in registers: of so many rows, in so many vectors of columns.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 3, TILE_VECTORS = 2;
#endif

#if defined(__AVX512BF16__)
#include <immintrin.h>

typedef __m512bh Pairs;  // of sixteen columns

inline Pairs load_pairs(const bf16 *p) { return (__m512bh)load_as<i32x16>(p); }
inline Pairs broadcast_pair(const bf16 *p) { return (__m512bh)(load_as<int32_t>(p) - i32x16{}); }
inline void add_products(f32x16 &sums, const Pairs &a, const Pairs &b) {
    sums = (f32x16)_mm512_dpbf16_ps((__m512)sums, a, b);
}
#else
struct Pairs {
    f32x16 first, second;
};

inline Pairs load_pairs(const bf16 *p) { return {load_first(p), load_second(p)}; }
inline Pairs broadcast_pair(const bf16 *p) {
    return {splat(to_float(p[0])), splat(to_float(p[1]))};
}
inline void add_products(f32x16 &sums, const Pairs &a, const Pairs &b) {
    sums += a.first * b.first;
    sums += a.second * b.second;
}
#endif
