// Products of rows rounded to 8 bits with weights of 4 or 8 bits in panels: 32 columns side by side, in
// blocks of 32 inputs, each of them 8 or 4 times [32 columns, 4 inputs] bytes; of 4 bits, the high
// halves are the inputs from 16 on. Whole numbers add up exactly within a block, and a sum lies in one
// lane from the first block to the last: its order depends on nothing but k.

#pragma once

#include <cmath>

#include "panels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr Index BLOCK = 32;  // inputs that are rounded together
constexpr int QUADS = 8;     // of a block
#if defined(__AVX512VNNI__)
constexpr int ROUNDED_ROWS = 8;  // of a tile: with as many sums, in two vectors each, all registers
#elif defined(__AVX512F__)
constexpr int ROUNDED_ROWS = 6;
#else
constexpr int ROUNDED_ROWS = 2;
#endif

struct half {
    uint16_t bits;
};

inline f32x16 load_numbers(const float *p) { return load16(p); }
inline f32x16 load_numbers(const half *p) {  // finite ones
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_as<u16x16>(p));
#else
    const u32x16 bits = __builtin_convertvector(load_as<u16x16>(p), u32x16);
    const f32x16 size = (f32x16)((bits & 0x7fff) << 13) * 0x1p112f;
    return (f32x16)((u32x16)size | (bits & 0x8000) << 16);
#endif
}

// sums + the products of four bytes without sign in each lane of `codes` with four that have one.
inline i32x16 add_dots(i32x16 sums, u32x16 codes, int32_t four) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    const u32x16 even = codes & 0x00ff00ff, odd = (codes >> 8) & 0x00ff00ff;
    const auto pair = [&](int first, int second) {
        return int32_t(uint32_t(uint16_t(int8_t(four >> first))) |
                       uint32_t(uint16_t(int8_t(four >> second))) << 16);
    };
    const int32_t own[2] = {pair(0, 16), pair(8, 24)};
    const u32x16 pairs[2] = {even, odd};
    for (int i = 0; i < 2; ++i) {
#if defined(__AVX512BW__)
        sums += (i32x16)_mm512_madd_epi16((__m512i)pairs[i], _mm512_set1_epi32(own[i]));
#else
        __m256i halves[2], products[2];
        std::memcpy(halves, &pairs[i], sizeof halves);
        for (int h = 0; h < 2; ++h)
            products[h] = _mm256_madd_epi16(halves[h], _mm256_set1_epi32(own[i]));
        sums += load_as<i32x16>(products);
#endif
    }
    return sums;
#else
    for (int b = 0; b < 4; ++b)
        sums += (i32x16)((codes >> 8 * b) & 255) * int32_t(int8_t(four >> 8 * b));
    return sums;
#endif
}

// BITS: of a code. S: of scales and minimums. No minimums: they are -2^(BITS - 1) times the scale.
template <int BITS_, class S>
struct Weights {
    static constexpr int BITS = BITS_;
    static constexpr Index BLOCK_BYTES = BLOCK * WIDTH * BITS / 8;
    const uint8_t *codes;
    const S *scales, *minimums;  // [n / 32, k / group, 32]
    Index n, k, group;

    Index panels() const { return (n + WIDTH - 1) / WIDTH; }

    const uint8_t *panel(Index panel) const { return codes + panel * (k / BLOCK) * BLOCK_BYTES; }

    Index scale_at(Index panel, Index block) const {
        return (panel * (k / group) + block * BLOCK / group) * WIDTH;
    }

    // Each four inputs of sixteen columns, the first of those that lie in the same bytes.
    static u32x16 load_quads(const uint8_t *block, int quad, int v) {
        return load_as<u32x16>(block + (quad * WIDTH + v * 16) * 4);
    }
    // The four inputs from 4 quad on of sixteen columns.
    static u32x16 load_quad(const uint8_t *block, int quad, int v) {
        if constexpr (BITS == 8) return load_quads(block, quad, v);
        return load_quads(block, quad % 4, v) >> (quad < 4 ? 0 : 4) & 0x0f0f0f0f;
    }
};

// Rows [m, k] as multiples, up to 127, of scales of their blocks. Those of a tile (row, height) lie
// together, block by block: codes in [height, 32] of them.
struct Rounded {
    int8_t *codes;   // [m, k]
    float *scales;   // [m, k / 32]
    float *sums;     // of a block's codes; where the weights have no minimums, times -2^(BITS - 1)
    Index k;
    float sums_times;

    // x [k] as row t of that tile.
    template <class T>
    void put(const T *x, Index row, Index height, Index t) const {
        typedef int8_t i8x16 __attribute__((vector_size(16)));
        int8_t *to = codes + row * k + t * BLOCK;
        Index at = row * (k / BLOCK) + t;
        for (Index b = 0; b < k / BLOCK; ++b, to += height * BLOCK, at += height) {
            f32x16 values[2];
            for (int v = 0; v < 2; ++v) values[v] = load16(x + b * BLOCK + v * 16);
            const i32x16 sizes[2] = {(i32x16)values[0] & 0x7fffffff, (i32x16)values[1] & 0x7fffffff};
            // In the order of whole numbers what is no number is the largest, and stays.
            const float largest = largest_size(sizes[0] > sizes[1] ? sizes[0] : sizes[1]);
            const float inverse = largest > 0x1p-120f ? 127.0f / largest : 0.0f;  // else infinite
            i32x16 sum = {};
            for (int v = 0; v < 2; ++v) {
                const f32x16 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds, ties to even
                // At least -128 of course: so that the product is rounded before it is added to.
                const f32x16 rounded = larger(values[v] * inverse, splat(-128.0f)) + shift;
                const i32x16 whole = (i32x16)rounded - (i32x16)shift;
                const i8x16 narrow = __builtin_convertvector(whole, i8x16);
                std::memcpy(to + v * 16, &narrow, sizeof narrow);
                sum += whole;
            }
            scales[at] = largest - largest == 0.0f ? largest / 127.0f : NAN;  // as inf times 0 is
            sums[at] = ::sum(__builtin_convertvector(sum, f32x16)) * sums_times;
        }
    }

    static float largest_size(i32x16 sizes) {
        const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int far = 8; far; far /= 2) {
            const i32x16 others = (i32x16)shuffled((f32x16)sizes, (f32x16)sizes, lanes ^ far);
            sizes = sizes > others ? sizes : others;
        }
        return ((f32x16)sizes)[0];
    }
};

// sums [MT, 32]: of rounded rows from `row` on, which are a tile, and of a panel of weights. Meanwhile
// `lines` lines of 64 bytes a block are brought into the second cache from `ahead` on.
template <int MT, class W>
[[gnu::noinline]] void rounded_tile(const W &w, Index panel, const Rounded &x, Index row, float *out,
                                    const uint8_t *ahead, int lines) {
    const Index blocks = w.k / BLOCK;
    const uint8_t *codes = w.panel(panel);
    const int8_t *own = x.codes + row * w.k;
    const float *own_scales = x.scales + row * blocks, *own_sums = x.sums + row * blocks;
    f32x16 sums[MT][2] = {};
    for (Index b = 0; b < blocks; ++b) {
        i32x16 dots[MT][2] = {};
        for (int i = 0; i < lines; ++i) __builtin_prefetch(ahead + b * W::BLOCK_BYTES + i * 64, 0, 2);
#pragma GCC unroll 8
        for (int q = 0; q < QUADS * W::BITS / 8; ++q) {
            u32x16 quads[2];
            for (int v = 0; v < 2; ++v) quads[v] = W::load_quads(codes, q, v);
#pragma GCC unroll 2
            for (int half = 0; half < 8 / W::BITS; ++half)
#pragma GCC unroll 16
                for (int t = 0; t < MT; ++t) {
                    const auto four = load_as<int32_t>(own + t * BLOCK + q * 4 + half * 16);
                    for (int v = 0; v < 2; ++v) {
                        const u32x16 quad =
                            W::BITS == 8 ? quads[v] : quads[v] >> 4 * half & 0x0f0f0f0f;
                        dots[t][v] = add_dots(dots[t][v], quad, four);
                    }
                }
        }
        const Index s = w.scale_at(panel, b);
        const auto add = [&](auto minimums) {
            for (int v = 0; v < 2; ++v) {
                const f32x16 scale = load_numbers(w.scales + s + v * 16);
                f32x16 least;
                if constexpr (minimums) least = load_numbers(w.minimums + s + v * 16);
#pragma GCC unroll 16
                for (int t = 0; t < MT; ++t) {
                    f32x16 whole = __builtin_convertvector(dots[t][v], f32x16);
                    if constexpr (minimums)
                        whole = whole * scale + least * own_sums[t];
                    else
                        whole = (whole + own_sums[t]) * scale;
                    sums[t][v] += whole * own_scales[t];
                }
            }
        };
        if (w.minimums)
            add(std::true_type{});
        else
            add(std::false_type{});
        codes += W::BLOCK_BYTES;
        own += MT * BLOCK, own_scales += MT, own_sums += MT;
    }
#pragma GCC unroll 16
    for (int t = 0; t < MT; ++t)
        for (int v = 0; v < 2; ++v) store16(out + t * WIDTH + v * 16, sums[t][v]);
}
