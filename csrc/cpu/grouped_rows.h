// Rows rounded to 8 bits, as products with weights in codes take them: a scale for each 32 inputs, whole
// numbers of a tile of rows together.

#pragma once

#include <algorithm>
#include <cmath>

#include "panels.h"

constexpr Index BLOCK = 32;  // inputs that are rounded together
constexpr int QUADS = 8;     // of a block
#if defined(__AVX512VNNI__)
constexpr int ROUNDED_ROWS = 8;  // of a tile: with as many sums, in two vectors each, all registers
#elif defined(__AVX512F__)
constexpr int ROUNDED_ROWS = 6;
#elif defined(__AVX2__)
constexpr int ROUNDED_ROWS = 5;
#else
constexpr int ROUNDED_ROWS = 2;
#endif

// Rows [m, k] as multiples, up to 127, of scales of their blocks. Those of a tile (row, height) lie
// together, block by block: codes in [height, 32] of them.
struct Rounded {
    int8_t *codes;   // [m, k]
    float *scales;   // [m, k / 32]
    float *sums;     // of a block's codes; where the weights have no minimums, times -2^(BITS - 1)
    Index k;
    float sums_times;

    // Whole rows from row `first` on, m of them and in tiles as products take them; row_of(row) is where
    // one lies. Only those of the tile-th tile.
    template <class R>
    void put_tile(const R &row_of, Index first, Index m, Index tile) const {
        const Index tiles = (m + ROUNDED_ROWS - 1) / ROUNDED_ROWS;
        const Index row = tile * m / tiles, end = (tile + 1) * m / tiles;
        for (Index t = row; t < end; ++t) put(row_of(t), first + row, end - row, t - row);
    }

    // x [k] as row t of that tile.
    template <class T>
    void put(const T *x, Index row, Index height, Index t) const {
        int8_t *to = codes + row * k + t * BLOCK;
        Index at = row * (k / BLOCK) + t;
        for (Index b = 0; b < k / BLOCK; ++b, to += height * BLOCK, at += height) {
            f32x16 values[2];
            for (int v = 0; v < 2; ++v) values[v] = load16(x + b * BLOCK + v * 16);
            const i32x16 sizes[2] = {(i32x16)values[0] & 0x7fffffff, (i32x16)values[1] & 0x7fffffff};
            // In the order of whole numbers what is no number is the largest, and stays.
            const auto bits = largest_lane(larger(sizes[0], sizes[1]));
            const auto largest = load_as<float>(&bits);
            const float inverse = largest > 0x1p-120f ? 127.0f / largest : 0.0f;  // else infinite
            i32x16 sum = {};
            for (int v = 0; v < 2; ++v) {
                const f32x16 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds, ties to even
                // At least -128 of course: so that the product is rounded before it is added to.
                const f32x16 rounded = larger(values[v] * inverse, splat(-128.0f)) + shift;
                const i32x16 whole = (i32x16)rounded - (i32x16)shift;
                store_as(to + v * 16, converted<Vector<int8_t, 16>>(whole));
                sum += whole;
            }
            scales[at] = largest - largest == 0.0f ? largest / 127.0f : NAN;  // as inf times 0 is
            sums[at] = ::sum(converted<f32x16>(sum)) * sums_times;
        }
    }
};
