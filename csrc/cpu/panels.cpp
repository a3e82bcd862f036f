// y = x W^T + b with W in panels. A panel is one stream in memory, read at the speed of memory by few
// rows of x; more find it in the second cache, where it was brought beside the products of the panels
// before. And rows out of panels.

#include <algorithm>
#include <string>
#include <type_traits>

#include "panels.h"
#include "pool.h"

namespace {

constexpr int TILE_PANELS = TILE_VECTORS / 2;
constexpr Index HALF = TILE_PANELS * WIDTH / 2;  // of a tile's weights, for each k
constexpr Index ENOUGH = 16, MANY = 16;  // blocks of a thread; tiles of rows of a block
constexpr Index WORTH_SHARING = 500000;  // products: waking a thread for fewer costs more

template <class Y>
struct Product {
    const bf16 *x;       // [m, k]
    const bf16 *panels;  // the last padded with anything
    const bf16 *bias;    // [n] or null
    Y *y;                // [m, n]
    Index m, n, k, x_stride;

    template <int MT, int PANELS>
    [[gnu::noinline]] void tile(Index row, Index panel, const bf16 *ahead) const {
        constexpr int VECTORS = 2 * PANELS;
        const bf16 *from = x + row * x_stride, *panels_from = panels + panel * WIDTH * k;
        const bf16 *rows[MT], *w[VECTORS];
        for (int t = 0; t < MT; ++t) rows[t] = from + t * x_stride;
        for (int v = 0; v < VECTORS; ++v) w[v] = panels_from + (v / 2) * WIDTH * k + (v % 2) * WIDTH;
        f32x16 sums[MT][VECTORS] = {};
        add_tile(rows, w, k, sums, ahead);
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

    // TILE_PANELS panels from `panel` on for rows [begin, end): they stay in the second cache, a tile of
    // x in the first. Beside the last two tiles as many are fetched from `next` on, if it is not null.
    void block(Index panel, Index begin, Index end, const bf16 *next) const {
        for_tiles(end - begin, [&](Index row, auto height) {
            constexpr int MT = decltype(height)::value;
            const Index left = end - begin - row - MT;
            const bf16 *ahead = next && left <= TILE_ROWS ? next + (left ? 0 : HALF * k) : nullptr;
            if ((panel + TILE_PANELS) * WIDTH < n + WIDTH)
                tile<MT, TILE_PANELS>(begin + row, panel, ahead);
            else
                tile<MT, 1>(begin + row, panel, ahead);
        });
    }

    void run(int threads) const {
        const Index all = (n + WIDTH - 1) / WIDTH;
        if (m * n * k < WORTH_SHARING) threads = 1;
        if (m <= TILE_ROWS) {  // read once: as fast as memory is, and long streams are the fastest
            const Index part = all / (4 * threads) / TILE_PANELS * TILE_PANELS;
            const Index size = std::clamp<Index>(part, TILE_PANELS, 32);
            return share((all + size - 1) / size, threads, [&](Index b) {
                for (Index p = b * size; p < std::min((b + 1) * size, all); p += TILE_PANELS)
                    block(p, 0, m, nullptr);
            });
        }
        // Few panels are shared by rows as well, so that the threads end at about the same time.
        const Index tiles = (all + TILE_PANELS - 1) / TILE_PANELS;
        const Index most = std::max<Index>(m / (MANY * TILE_ROWS), 1);
        const Index parts = threads > 1 ? std::clamp<Index>(ENOUGH * threads / tiles, 1, most) : 1;
        share_blocks(tiles * parts, threads, [&](Blocks &blocks) {
            Index own, next;
            for (bool more = blocks.next(own); more; own = next) {
                more = blocks.next(next);  // a block early, to know what to fetch
                const bool fetches = more && next / parts != own / parts;
                block(own / parts * TILE_PANELS, own % parts * m / parts, (own % parts + 1) * m / parts,
                      fetches ? panels + next / parts * 2 * HALF * k : nullptr);
            }
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
