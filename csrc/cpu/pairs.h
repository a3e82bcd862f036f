// Products of bf16 pairs: two values of k side by side, as vdpbf16ps takes them. Without that
// instruction a pair is two fp32 multiply-adds, in the same order.

#pragma once

#include <cstring>

#include "vec.h"

// Sums that are held in registers: of so many rows, in so many vectors of columns.
#if defined(__AVX512BF16__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#elif defined(__AVX512F__)
constexpr int TILE_ROWS = 5, TILE_VECTORS = 4;  // a pair of columns is two registers
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 5, TILE_VECTORS = 1;
#else
constexpr int TILE_ROWS = 3, TILE_VECTORS = 1;
#endif

// What rows are multiplied as. Without products of pairs they are widened once, not for every tile.
#if defined(__AVX512BF16__)
using Operand = bf16;
#else
using Operand = float;
#endif

// Two values each of sixteen columns: what fp32 has in place of pairs.
struct Both {
    f32x16 first, second;
};

inline Both load_pairs(const float *p) { return {load16(p), load16(p + 16)}; }
inline Both load_half(const float *p) { return {load16(p), f32x16{}}; }
inline Both load_rows(const float *a, const float *b) { return {load16(a), load16(b)}; }
inline Both broadcast_pair(const float *p) { return {splat(p[0]), splat(p[1])}; }
inline void add_products(f32x16 &sums, const Both &a, const Both &b) {
    sums += a.first * b.first;
    sums += a.second * b.second;
}

// Sixteen values of each of two rows, side by side.
inline u32x16 interleaved(const bf16 *a, const bf16 *b) {
    const auto wide = [](const bf16 *p) {
        return converted<u32x16>(load_as<u16x16>(p));
    };
    return wide(a) | wide(b) << 16;
}

#if defined(__AVX512BF16__)
typedef __m512bh Pairs;  // of sixteen columns

inline Pairs load_pairs(const bf16 *p) { return (__m512bh)load_as<i32x16>(p); }
inline Pairs load_half(const bf16 *p) { return (__m512bh)load_half_as<u32x16>(p); }
inline Pairs load_rows(const bf16 *a, const bf16 *b) { return (__m512bh)interleaved(a, b); }
inline Pairs broadcast_pair(const bf16 *p) { return (__m512bh)(load_as<int32_t>(p) - i32x16{}); }
inline void add_products(f32x16 &sums, const Pairs &a, const Pairs &b) {
    sums = (f32x16)_mm512_dpbf16_ps((__m512)sums, a, b);
}
#else
typedef Both Pairs;

inline Pairs load_pairs(const bf16 *p) { return {load_first(p), load_second(p)}; }
inline Pairs load_half(const bf16 *p) {
    const auto half = load_half_as<u32x16>(p);
    return {(f32x16)(half << 16), (f32x16)(half & 0xffff0000u)};
}
inline Pairs load_rows(const bf16 *a, const bf16 *b) { return {load16(a), load16(b)}; }
inline Pairs broadcast_pair(const bf16 *p) {
    return {splat(to_float(p[0])), splat(to_float(p[1]))};
}
#endif
