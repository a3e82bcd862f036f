// y = x W^T + b with W in panels: 32 of its rows, which are columns of y, side by side in pairs of k,
// [N / 32, K / 2, 32, 2]. A panel is one stream in memory, read at the speed of memory by few rows
// of x; many find it in the second cache. A sum lies in one lane from the first k to the last: it
// needs no horizontal additions, and its order depends on nothing but k. And rows out of panels.

#include <algorithm>
#include <string>
#include <type_traits>

#include "model_ops.h"
#include "pairs.h"
#include "pool.h"

namespace {

constexpr Index WIDTH = 32;  // columns of a panel
constexpr int TILE_PANELS = TILE_VECTORS / 2;
constexpr Index WORTH_SHARING = 500000;  // products: waking a thread for fewer costs more

template <class Y>
struct Product {
    const bf16 *x;       // [m, k]
    const bf16 *panels;  // the last padded with anything
    const bf16 *bias;    // [n] or null
    Y *y;                // [m, n]
    Index m, n, k, x_stride;

    template <int MT, int PANELS>
    [[gnu::noinline]] void tile(Index row, Index panel) const {
        constexpr int VECTORS = 2 * PANELS;
        const bf16 *from = x + row * x_stride, *w = panels + panel * WIDTH * k;
        f32x16 sums[MT][VECTORS] = {};
        for (Index i = 0; i < k; i += 2) {
            Pairs columns[VECTORS];
            for (int v = 0; v < VECTORS; ++v)
                columns[v] = load_pairs(w + (v / 2) * WIDTH * k + i * WIDTH + (v % 2) * WIDTH);
            for (int t = 0; t < MT; ++t) {
                const Pairs own = broadcast_pair(from + t * x_stride + i);
                for (int v = 0; v < VECTORS; ++v) add_products(sums[t][v], own, columns[v]);
            }
        }
        for (int v = 0; v < VECTORS; ++v) {
            const Index column = panel * WIDTH + v * 16;
            for (int t = 0; t < MT; ++t) put(sums[t][v], y + (row + t) * n + column, column);
        }
    }

    // Sixteen sums, or those of them that are columns of y.
    void put(f32x16 sums, Y *to, Index column) const {
        if (column + 16 <= n) {
            store16(to, bias ? sums + load16(bias + column) : sums);
            return;
        }
        for (Index c = column; c < n; ++c)
            store(to + c - column, sums[c - column] + (bias ? to_float(bias[c]) : 0.0f));
    }

    template <int PANELS>
    void rows(Index row, Index count, Index panel) const {
        switch (count) {
            case 1: return tile<1, PANELS>(row, panel);
            case 2: return tile<2, PANELS>(row, panel);
            case 3: return tile<3, PANELS>(row, panel);
#if defined(__AVX512F__)
            case 4: return tile<4, PANELS>(row, panel);
            case 5: return tile<5, PANELS>(row, panel);
            case 6: return tile<6, PANELS>(row, panel);
#endif
        }
    }

    // Panels [begin, end) for all rows: one or two stay in the second cache, a tile of x in the first.
    void block(Index begin, Index end) const {
        const Index tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
        for (Index panel = begin; panel < end; panel += TILE_PANELS)
            for (Index t = 0; t < tiles; ++t) {
                const Index row = t * m / tiles, count = (t + 1) * m / tiles - row;
                if (panel + TILE_PANELS <= end)
                    rows<TILE_PANELS>(row, count, panel);
                else
                    rows<1>(row, count, panel);
            }
    }

    void run(int threads) const {
        const Index all = (n + WIDTH - 1) / WIDTH;
        if (m * n * k < WORTH_SHARING) threads = 1;
        const Index part = all / (4 * threads) / TILE_PANELS * TILE_PANELS;
        const Index size = std::clamp<Index>(part, TILE_PANELS, 32);
        share((all + size - 1) / size, threads, [&](Index b) {
            block(b * size, std::min((b + 1) * size, all));
        });
    }
};

}  // namespace

void linear_panels(Address x, Index x_stride, Address panels, Address bias, Address y, Index m,
                   Index n, Index k, bool wide_output, int threads) {
    const auto run = [&](auto *out) {
        using Y = std::remove_pointer_t<decltype(out)>;
        Product<Y>{at<const bf16>(x), at<const bf16>(panels), at<const bf16>(bias), out, m, n, k,
                   x_stride}
            .run(threads);
    };
    if (wide_output)
        run(at<float>(y));
    else
        run(at<bf16>(y));
}

void embed_panels(Address ids, Address panels, Address out, Index tokens, Index num_rows,
                  Index k) {
    const auto *pairs = at<const std::uint32_t>(panels);
    for (Index t = 0; t < tokens; ++t) {
        const Index id = at<const std::int32_t>(ids)[t];
        if (id < 0 || id >= num_rows)
            throw pybind11::index_error("token id " + std::to_string(id) + " has no embedding");
        const std::uint32_t *from = pairs + id / 32 * 16 * k + id % 32;
        auto *to = at<std::uint32_t>(out) + t * k / 2;
        for (Index i = 0; i < k / 2; ++i) to[i] = from[i * 32];
    }
}
