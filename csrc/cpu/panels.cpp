// y = x W^T + b with W in panels. A panel is one stream in memory, read at the speed of memory by few
// rows of x; many find it in the second cache. And rows out of panels.

#include <algorithm>
#include <string>
#include <type_traits>

#include "panels.h"
#include "pool.h"

namespace {

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
        const bf16 *from = x + row * x_stride, *panels_from = panels + panel * WIDTH * k;
        const bf16 *rows[MT], *w[VECTORS];
        for (int t = 0; t < MT; ++t) rows[t] = from + t * x_stride;
        for (int v = 0; v < VECTORS; ++v) w[v] = panels_from + (v / 2) * WIDTH * k + (v % 2) * WIDTH;
        f32x16 sums[MT][VECTORS] = {};
        add_tile(rows, w, k, sums);
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

    // Panels [begin, end) for all rows: one or two stay in the second cache, a tile of x in the first.
    void block(Index begin, Index end) const {
        for (Index panel = begin; panel < end; panel += TILE_PANELS)
            for_tiles(m, [&](Index row, auto height) {
                constexpr int MT = decltype(height)::value;
                if (panel + TILE_PANELS <= end)
                    tile<MT, TILE_PANELS>(row, panel);
                else
                    tile<MT, 1>(row, panel);
            });
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
