// What decode does with some rows and some keys: products of a tile, and the states of rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "model_ops.h"
#include "pairs.h"
#include "softmax.h"

constexpr Index KEYS = 256;  // of a block
constexpr Index TILE = 16;   // keys at a time, and how far ahead they are prefetched

// Sums in registers, in vectors, and rows that share a read of them.
#if defined(__AVX512F__)
constexpr int HELD = 16, MOST_ROWS = 4;
#else
constexpr int HELD = 4, MOST_ROWS = 2;
#endif

// What is needed a tile later: the hardware cannot predict addresses from a page table. It is asked for
// in between, key by key, for a burst of requests would wait for each other.
template <class T, int D>
struct Later {
    const T *pool = nullptr;
    const Index *offsets = nullptr;

    void fetch(Index j) const {
        if (pool)
            for (Index d = 0; d < D; d += 64 / sizeof(T)) prefetch(pool, offsets[j] + d);
    }
};

// scores[r][j] = q_r . k_j for R rows and TILE keys.
template <class T, int D, int R>
void multiply_keys(const T *queries, const T *keys, const Index *offsets, const Later<T, D> &later,
                   float *scores) {
    f32x16 folded[R][4];
    for (int i = 0; i < 4; ++i) {
        f32x16 sums[R][4] = {};
        const T *own[4];
        for (int c = 0; c < 4; ++c) own[c] = keys + offsets[i + 4 * c];
        for (int c = 0; c < 4; ++c) later.fetch(4 * i + c);
        const auto add = [&](int d, auto load) {
            decltype(load(queries)) parts[4];
            for (int c = 0; c < 4; ++c) parts[c] = load(own[c] + d);
            for (int r = 0; r < R; ++r) {
                const auto query = load(queries + r * D + d);
                for (int c = 0; c < 4; ++c) add_products(sums[r][c], query, parts[c]);
            }
        };
        for (int d = 0; d + 32 <= D; d += 32) add(d, [](const T *p) { return load_pairs(p); });
        if constexpr (D % 32) add(D - 16, [](const T *p) { return load_half(p); });
#if defined(__AVX512F__)
        for (int r = 0; r < R; ++r) folded[r][i] = fold4(sums[r]);
    }
    for (int r = 0; r < R; ++r) store16(scores + r * KEYS, sum16(folded[r]));
#else
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 4; ++c) scores[r * KEYS + i + 4 * c] = sum(sums[r][c]);
    }
#endif
}

// sums[r] += sum_j p_rj v_j for R rows, TILE keys and dimensions [FIRST, D); rows of sums lie `stride`
// apart.
template <class T, int D, int R, int FIRST = 0>
void add_values(const T *probabilities, const T *values, const Index *offsets,
                const Later<T, D> &later, float *sums, Index stride) {
    constexpr int VECTORS = std::min((D - FIRST) / 16, HELD / R);
    f32x16 own[R][VECTORS];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) own[r][v] = load16(sums + r * stride + FIRST + v * 16);
    for (Index j = 0; j < TILE; j += 2) {
        const T *a = values + offsets[j] + FIRST, *b = values + offsets[j + 1] + FIRST;
        if (FIRST == 0) later.fetch(j), later.fetch(j + 1);
        decltype(broadcast_pair(a)) p[R];
        for (int r = 0; r < R; ++r) p[r] = broadcast_pair(probabilities + r * KEYS + j);
        for (int v = 0; v < VECTORS; ++v) {
            const auto both = load_rows(a + v * 16, b + v * 16);
            for (int r = 0; r < R; ++r) add_products(own[r][v], p[r], both);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) store16(sums + r * stride + FIRST + v * 16, own[r][v]);
    if constexpr (FIRST + VECTORS * 16 < D)
        add_values<T, D, R, FIRST + VECTORS * 16>(probabilities, values, offsets, later, sums, stride);
}

// f(row, count) for all rows, as many at a time as share a read.
template <int COUNT = MOST_ROWS, class F>
void in_tiles(Index row, Index end, const F &f) {
    for (; row + COUNT <= end; row += COUNT) f(row, std::integral_constant<int, COUNT>{});
    if constexpr (COUNT > 1) in_tiles<COUNT / 2>(row, end, f);
}

// States of rows: each D floats of sums, the largest score, the sum of probabilities.
template <int D>
struct States {
    static constexpr Index STRIDE = D + 16;  // whole lines of the cache

    float *data;

    float *sums(Index row) const { return data + row * STRIDE; }
    float &largest(Index row) const { return data[row * STRIDE + D]; }
    float &total(Index row) const { return data[row * STRIDE + D + 1]; }

    void clear(Index rows) const {
        std::fill_n(data, rows * STRIDE, 0.0f);
        for (Index row = 0; row < rows; ++row) largest(row) = NONE;
    }

    // Adds the states of later keys. One without keys changes no bit of the other.
    void add(const States &later, Index rows) const {
        for (Index row = 0; row < rows; ++row) {
            if (later.largest(row) == NONE) continue;
            if (largest(row) == NONE) {
                std::copy_n(later.sums(row), STRIDE, sums(row));
                continue;
            }
            const float highest = std::max(largest(row), later.largest(row));
            const float fix = std::exp(largest(row) - highest);
            const float own = std::exp(later.largest(row) - highest);
            for (Index d = 0; d < D; d += 16) {
                const f32x16 more = load16(later.sums(row) + d) * own;
                store16(sums(row) + d, load16(sums(row) + d) * fix + more);
            }
            total(row) = total(row) * fix + later.total(row) * own;
            largest(row) = highest;
        }
    }
};
