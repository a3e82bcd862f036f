// Products with weights in panels: 32 of a weight's rows, which are columns of the result, side by side
// in pairs of k, [N / 32, K / 2, 32, 2]. A sum lies in one lane from the first k to the last: it
// needs no horizontal additions, and its order depends on nothing but k.

#pragma once

#include <type_traits>

#include "model_ops.h"
#include "pairs.h"

constexpr Index WIDTH = 32;  // columns of a panel

// sums[t][v] += x[t] times the sixteen columns that begin at w[v] of their panel, over k. Meanwhile half
// as many weights, or as many where it is one vector, are brought into the second cache from `ahead` on, if
// it is not null.
template <class X, int MT, int VECTORS>
[[gnu::always_inline]] inline void add_tile(const X *const (&x)[MT], const bf16 *const (&w)[VECTORS],
                                            Index k, f32x16 (&sums)[MT][VECTORS],
                                            const bf16 *ahead = nullptr) {
    for (Index i = 0; i < k; i += 2) {
        Pairs columns[VECTORS];
        constexpr int LINES = VECTORS > 1 ? VECTORS / 2 : 1;
        for (int v = 0; ahead && v < LINES; ++v)
            __builtin_prefetch(ahead + (i / 2 * LINES + v) * WIDTH, 0, 2);
        for (int v = 0; v < VECTORS; ++v) columns[v] = load_pairs(w[v] + i * WIDTH);
        for (int t = 0; t < MT; ++t) {
            const auto own = broadcast_pair(x[t] + i);
            for (int v = 0; v < VECTORS; ++v) add_products(sums[t][v], own, columns[v]);
        }
    }
}

// f(the number as a constant) for one from 1 to MOST.
template <int MOST, class F>
void with_constant(Index number, const F &f) {
    if constexpr (MOST > 1)
        if (number < MOST) return with_constant<MOST - 1>(number, f);
    f(std::integral_constant<int, MOST>{});
}

// f(first row, number of rows as a constant) for tiles of about equal height, up to MOST, over m rows.
template <int MOST = TILE_ROWS, class F>
void for_tiles(Index m, const F &f) {
    const Index tiles = (m + MOST - 1) / MOST;
    for (Index t = 0; t < tiles; ++t) {
        const Index row = t * m / tiles;
        with_constant<MOST>((t + 1) * m / tiles - row, [&](auto height) { f(row, height); });
    }
}
