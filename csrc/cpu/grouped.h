// Products of rows rounded to 8 bits with weights of 4 or 8 bits in panels: 32 columns side by side, in
// blocks of 32 inputs, each of them 8 or 4 times [32 columns, 4 inputs] bytes; of 4 bits, the high
// halves are the inputs from 16 on. Whole numbers add up exactly within a block, and a sum lies in one
// lane from the first block to the last: its order depends on nothing but k.

#pragma once

#include <algorithm>
#include <vector>

#include "grouped_rows.h"
#include "panels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int FLOAT_ROWS = 6;  // whose sums are held in registers
#else
constexpr int FLOAT_ROWS = 2;
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr Index FETCHING_ROWS = 1;  // or more: the next panel is fetched beside their products
#else
constexpr Index FETCHING_ROWS = 2;
#endif

struct half {
    uint16_t bits;
};

inline f32x16 load_numbers(const float *p) { return load16(p); }
inline f32x16 load_numbers(const half *p) {  // finite ones
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_as<u16x16>(p));
#else
    const u32x16 bits = converted<u32x16>(load_as<u16x16>(p));
    const f32x16 size = (f32x16)((bits & 0x7fff) << 13) * 0x1p112f;
    return (f32x16)((u32x16)size | (bits & 0x8000) << 16);
#endif
}

#if defined(__AVX512BW__)
constexpr auto multiply_add_pairs = [](auto a, auto b) {
    return (i32x16)_mm512_madd_epi16((__m512i)a, (__m512i)b);
};
constexpr auto multiply_add_bytes = [](auto a, auto b) {
    return (i32x16)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
};
#endif

// sums + the products of four codes of BITS in each lane with four bytes with sign. Those of a block
// are `summed` behind it: of 4 bits, they add up in 16 where bytes are multiplied in pairs.
template <int BITS, class I, class U>
inline I add_dots(I sums, U codes, U own) {
    if constexpr (IN_HALVES<I>) {
        return {add_dots<BITS>(sums.low, codes.low, own.low),
                add_dots<BITS>(sums.high, codes.high, own.high)};
    } else {
#if defined(__AVX512VNNI__)
        return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)own);
#elif defined(__AVX512BW__)
        typedef int16_t I16 __attribute__((vector_size(sizeof(I))));
        if constexpr (BITS == 4) {  // at most 8 quads of 2 * 15 * 127
            return (I)((I16)sums + (I16)multiply_add_bytes(codes, own));
        } else {  // two products of bytes may not fit 16 bits
            const U even = codes & 0x00ff00ff, odd = codes >> 8 & 0x00ff00ff;
            const I16 own_even = (I16)own << 8 >> 8, own_odd = (I16)own >> 8;
            return sums + multiply_add_pairs(even, own_even) + multiply_add_pairs(odd, own_odd);
        }
#else
        for (int b = 0; b < 4; ++b)
            sums += (I)(codes >> 8 * b & 255) * ((I)own << (24 - 8 * b) >> 24);
        return sums;
#endif
    }
}

template <int BITS, class I>
inline I summed(I dots) {
#if defined(__AVX512BW__) && !defined(__AVX512VNNI__)
    if constexpr (IN_HALVES<I>) {
        return {summed<BITS>(dots.low), summed<BITS>(dots.high)};
    } else if constexpr (BITS == 4) {
        return multiply_add_pairs(dots, filled<I>(0x00010001));
    }
#endif
    return dots;
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

    // One of several matrices, which lie one after another.
    Weights matrix(Index i) const {
        const Index numbers = i * panels() * (k / group) * WIDTH;
        const S *least = minimums ? minimums + numbers : nullptr;
        return {codes + i * panels() * (k / BLOCK) * BLOCK_BYTES, scales + numbers, least, n, k, group};
    }

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

// sums [MT, 32]: of rounded rows from `row` on, which are a tile, and of a panel of weights. Meanwhile
// `lines` lines of 64 bytes a block are brought into the second cache from `ahead` on.
#if defined(__AVX2__) && !defined(__AVX512F__)
typedef int16_t i16x16 __attribute__((vector_size(32)));
using f32x8 = Vector<float, 8>;
using i32x8 = Vector<int32_t, 8>;
using u32x8 = Vector<uint32_t, 8>;

inline f32x8 load8(const float *p) { return load_as<f32x8>(p); }
inline f32x8 load8(const half *p) { return (f32x8)_mm256_cvtph_ps(load_as<__m128i>(p)); }

inline i16x16 multiply_add_bytes(u32x8 codes, u32x8 own) {
    return (i16x16)_mm256_maddubs_epi16((__m256i)codes, (__m256i)own);
}
inline i32x8 add_pairs(i16x16 dots, int16_t times) {
    return (i32x8)_mm256_madd_epi16((__m256i)dots, _mm256_set1_epi16(times));
}

// The same without products of bytes that are added to sums of 32 bits. Pairs of them are added up in 16 bits,
// which hold a block's of codes of 4 bits, at most 16 * 15 * 127; a code of 8 is taken as two of 4, which are
// put together behind the block. These sums fill the registers: those in fp32 lie in the first cache.
template <int MT, class W>
[[gnu::noinline]] void rounded_tile(const W &w, Index panel, const Rounded &x, Index row, float *out,
                                    const uint8_t *ahead, int lines) {
    constexpr int EIGHTS = 8 / W::BITS;  // of columns at a time; of inputs in a byte
    const Index blocks = w.k / BLOCK, per_group = w.group / BLOCK, first = w.scale_at(panel, 0);
    const uint8_t *codes = w.panel(panel);
    const int8_t *own = x.codes + row * w.k;
    const float *own_scales = x.scales + row * blocks, *own_sums = x.sums + row * blocks;
    std::fill_n(out, MT * WIDTH, 0.0f);
    for (Index b = 0; b < blocks; ++b) {
        for (int i = 0; i < lines; ++i) __builtin_prefetch(ahead + b * W::BLOCK_BYTES + i * 64, 0, 2);
        const Index s = first + b / per_group * WIDTH;
        for (int c = 0; c < WIDTH; c += EIGHTS * 8) {
            i16x16 dots[MT][2] = {};
#pragma GCC unroll 8
            for (int q = 0; q < QUADS / EIGHTS; ++q)
#pragma GCC unroll 2
                for (int half = 0; half < EIGHTS; ++half) {
                    u32x8 parts[2];
                    for (int p = 0; p < 2; ++p) {
                        const int eight = W::BITS == 4 ? p : 0, shift = W::BITS == 4 ? half : p;
                        const auto quads = load_as<u32x8>(codes + (q * WIDTH + c + eight * 8) * 4);
                        parts[p] = quads >> 4 * shift & 0x0f0f0f0f;
                    }
#pragma GCC unroll 16
                    for (int t = 0; t < MT; ++t) {
                        const auto four = load_as<uint32_t>(own + t * BLOCK + q * 4 + half * 16);
                        for (int p = 0; p < 2; ++p) {
                            i16x16 sum = dots[t][p] + multiply_add_bytes(parts[p], filled<u32x8>(four));
                            asm("" : "+x"(sum));  // one after another: a tree would need more registers
                            dots[t][p] = sum;
                        }
                    }
                }
            const auto add = [&](auto minimums) {
                f32x8 scales[EIGHTS], least[EIGHTS];
                for (int p = 0; p < EIGHTS; ++p) {
                    scales[p] = load8(w.scales + s + c + p * 8);
                    if constexpr (minimums) least[p] = load8(w.minimums + s + c + p * 8);
                }
#pragma GCC unroll 16
                for (int t = 0; t < MT; ++t) {
                    const float own_scale = own_scales[t], own_sum = own_sums[t];
                    for (int p = 0; p < EIGHTS; ++p) {
                        i32x8 dot = add_pairs(dots[t][p], 1);
                        if constexpr (W::BITS == 8) dot += add_pairs(dots[t][1], 16);
                        f32x8 whole = converted<f32x8>(dot);
                        if constexpr (minimums)
                            whole = whole * scales[p] + least[p] * own_sum;
                        else
                            whole = (whole + own_sum) * scales[p];
                        float *to = out + t * WIDTH + c + p * 8;
                        store_as(to, load_as<f32x8>(to) + whole * own_scale);
                    }
                }
            };
            if (w.minimums)
                add(std::true_type{});
            else
                add(std::false_type{});
        }
        codes += W::BLOCK_BYTES;
        own += MT * BLOCK, own_scales += MT, own_sums += MT;
    }
}
#else
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
                    const auto four = load_as<uint32_t>(own + t * BLOCK + q * 4 + half * 16);
                    for (int v = 0; v < 2; ++v) {
                        const u32x16 quad =
                            W::BITS == 8 ? quads[v] : quads[v] >> 4 * half & 0x0f0f0f0f;
                        dots[t][v] = add_dots<W::BITS>(dots[t][v], quad, filled<u32x16>(four));
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
                    f32x16 whole = converted<f32x16>(summed<W::BITS>(dots[t][v]));
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
#endif

// A panel in floats, [k, 32].
template <class W>
void dequantize(const W &w, Index panel, float *out) {
    const uint8_t *from = w.panel(panel);
    for (Index b = 0; b < w.k / BLOCK; ++b, from += W::BLOCK_BYTES)
        for (int v = 0; v < 2; ++v) {
            const Index s = w.scale_at(panel, b) + v * 16;
            const f32x16 scale = load_numbers(w.scales + s);
            const f32x16 least =
                w.minimums ? load_numbers(w.minimums + s) : scale * -float(1 << (W::BITS - 1));
            for (int q = 0; q < QUADS; ++q) {
                const u32x16 quad = W::load_quad(from, q, v);
                for (int i = 0; i < 4; ++i) {
                    const i32x16 code = (i32x16)((quad >> 8 * i) & 255);
                    store16(out + (b * BLOCK + q * 4 + i) * WIDTH + v * 16,
                            converted<f32x16>(code) * scale + least);
                }
            }
        }
}

// out [MT, 32]: of rows of x and of a panel in floats.
template <int MT, class T>
[[gnu::noinline]] void float_tile(const T *const (&x)[MT], const float *weights, Index k, float *out) {
    f32x16 sums[MT][2] = {};
    for (Index i = 0; i < k; ++i)
        for (int v = 0; v < 2; ++v) {
            const f32x16 columns = load16(weights + i * WIDTH + v * 16);
            for (int t = 0; t < MT; ++t) sums[t][v] += columns * to_float(x[t][i]);
        }
    for (int t = 0; t < MT; ++t)
        for (int v = 0; v < 2; ++v) store16(out + t * WIDTH + v * 16, sums[t][v]);
}

// One panel's columns of all m rows, from row `first` of what is rounded on: put(sums [rows, 32], first of
// the m, rows). Beside them the next panel is fetched, if there is one; a single row asks for nothing but
// weights, which a CPU with AVX-512 fetches faster by itself, and one with AVX2 alone does not.
template <class W, class F>
void rounded_panel(const W &w, Index panel, const Rounded &x, Index first, Index m, const F &put) {
    constexpr Index LINES = W::BLOCK_BYTES / 64;
    if (m == 0) return;
    const Index tiles = (m + ROUNDED_ROWS - 1) / ROUNDED_ROWS, lines = (LINES + tiles - 1) / tiles;
    Index done = m >= FETCHING_ROWS && panel + 1 < w.panels() ? 0 : LINES;
    for_tiles<ROUNDED_ROWS>(m, [&](Index row, auto height) {
        constexpr int MT = decltype(height)::value;
        alignas(64) float sums[MT * WIDTH];
        const Index own = std::min(lines, LINES - done);
        rounded_tile<MT>(w, panel, x, first + row, sums, w.panel(panel + 1) + done * 64, int(own));
        done += own;
        put(sums, row, Index(MT));
    });
}

// The same of rows that are not rounded: row_of(row) is where one lies.
template <class W, class R, class F>
void float_panel(const W &w, Index panel, const R &row_of, Index m, const F &put) {
    using T = std::remove_pointer_t<decltype(row_of(0))>;
    static thread_local std::vector<float> weights;
    weights.resize(std::max<std::size_t>(weights.size(), w.k * WIDTH));
    dequantize(w, panel, weights.data());
    for_tiles<FLOAT_ROWS>(m, [&](Index row, auto height) {
        constexpr int MT = decltype(height)::value;
        alignas(64) float sums[MT * WIDTH];
        T *rows[MT];
        for (int t = 0; t < MT; ++t) rows[t] = row_of(row + t);
        float_tile<MT>(rows, weights.data(), w.k, sums);
        put(sums, row, Index(MT));
    });
}

// Calls f with the weights as what they are.
template <class F>
void with_weights(Address codes, Address scales, Address minimums, Index n, Index k, Index group,
                  int bits, bool is_half, F f) {
    const auto call = [&](auto bits_of, auto number) {
        using S = decltype(number);
        f(Weights<decltype(bits_of)::value, S>{at<const uint8_t>(codes), at<const S>(scales),
                                               at<const S>(minimums), n, k, group});
    };
    const auto with_bits = [&](auto number) {
        if (bits == 4)
            call(std::integral_constant<int, 4>{}, number);
        else
            call(std::integral_constant<int, 8>{}, number);
    };
    if (is_half)
        with_bits(half{});
    else
        with_bits(float{});
}
