// y = x W^T + b with W in panels. A panel is one stream in memory, read at the speed of memory by few
// rows of x; more find it in the second cache, where it was brought beside the products of the panels
// before. And rows out of panels.

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "panels.h"
#include "pool.h"

namespace {

constexpr int TILE_PANELS = std::max(TILE_VECTORS / 2, 1);  // that stay in the second cache
constexpr Index HALF = TILE_PANELS * WIDTH / 2;  // of their weights, for each k
constexpr Index ENOUGH = 16, MANY = 16;  // blocks of a thread; tiles of rows of a block
constexpr Index WORTH_SHARING = 500000;  // products: waking a thread for fewer costs more
constexpr Index WIDENED = 1 << 20;       // floats that rows are widened to at a time, about

// Vectors of a tile of so many rows. Where few fit, those of few rows come from several panels at a time,
// for one stream of memory is not read as fast as it could be.
constexpr int wide_tile(int rows) {
    if (TILE_VECTORS > 1) return TILE_VECTORS;
    return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 2 : 1;
}

template <class Y>
struct Product {
    const Operand *x;    // [m, k]
    const bf16 *panels;  // the last padded with anything
    const bf16 *bias;    // [n] or null
    Y *y;                // [m, n]
    Index m, n, k, x_stride;

    // Sums of columns from 16 `first` on.
    template <int MT, int VECTORS>
    [[gnu::noinline]] void tile(Index row, Index first, const bf16 *ahead) const {
        const Operand *from = x + row * x_stride, *rows[MT];
        const bf16 *w[VECTORS];
        for (int t = 0; t < MT; ++t) rows[t] = from + t * x_stride;
        for (int v = 0; v < VECTORS; ++v)
            w[v] = panels + (first + v) / 2 * WIDTH * k + (first + v) % 2 * WIDTH;
        f32x16 sums[MT][VECTORS] = {};
        add_tile(rows, w, k, sums, ahead);
        for (int v = 0; v < VECTORS; ++v) {
            const Index column = (first + v) * 16;
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

    // Sums of MT rows and columns from 16 `first` to 16 `end`, WIDE vectors at a time.
    template <int MT, int WIDE>
    void tiles(Index row, Index first, Index end, const bf16 *ahead) const {
        for (; first + WIDE <= end; first += WIDE)
            tile<MT, WIDE>(row, first, WIDE == 1 && ahead ? ahead + first % 2 * HALF * k : ahead);
        if constexpr (WIDE > std::min(TILE_VECTORS, 2))
            if (first < end) tiles<MT, WIDE / 2>(row, first, end, ahead);
    }

    // Panels [panel, panel + count) for rows [begin, end): they stay in the second cache, a tile of x in
    // the first. Beside the last tiles as many are fetched from `next` on, if it is not null.
    void block(Index panel, Index count, Index begin, Index end, const bf16 *next) const {
        const Index upto = 2 * std::min(panel + count, (n + WIDTH - 1) / WIDTH);
        for_tiles(end - begin, [&](Index row, auto height) {
            constexpr int MT = decltype(height)::value;
            const Index left = end - begin - row - MT;
            const bf16 *ahead = nullptr;
            if (next && left == 0) ahead = TILE_VECTORS > 1 ? next + HALF * k : next;
            if (next && TILE_VECTORS > 1 && left > 0 && left <= TILE_ROWS) ahead = next;
            tiles<MT, wide_tile(MT)>(begin + row, 2 * panel, upto, ahead);
        });
    }

    void run(int threads) const {
        const Index all = (n + WIDTH - 1) / WIDTH;
        if (m * n * k < WORTH_SHARING) threads = 1;
        if (m <= TILE_ROWS) {  // read once: as fast as memory is, and long streams are the fastest
            const Index part = all / (4 * threads) / TILE_PANELS * TILE_PANELS;
            const Index size = std::clamp<Index>(part, TILE_PANELS, 32);
            return share((all + size - 1) / size, threads, [&](Index b) {
                const Index end = std::min((b + 1) * size, all);
                if (wide_tile(int(m)) > 1) return block(b * size, size, 0, m, nullptr);
                for (Index p = b * size; p < end; ++p)
                    block(p, 1, 0, m, p + 1 < all ? panels + (p + 1) * WIDTH * k : nullptr);
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
                block(own / parts * TILE_PANELS, TILE_PANELS, own % parts * m / parts,
                      (own % parts + 1) * m / parts,
                      fetches ? panels + next / parts * 2 * HALF * k : nullptr);
            }
        });
    }
};

template <class Y>
void multiply(Product<Y> product, const bf16 *x, int threads) {
    if constexpr (std::is_same_v<Operand, bf16>) {
        product.x = x;
        product.run(threads);
    } else {
        static thread_local std::vector<float> widened;
        const Index m = product.m, k = product.k, x_stride = product.x_stride;
        const Index stride = (k + 15) / 16 * 16 + 16;  // no two rows in one set of the cache
        const Index most = std::clamp<Index>(WIDENED / stride, 4 * TILE_ROWS, 512);
        const auto floats = std::size_t(std::min(m, most) * stride);
        if (widened.size() < floats) widened.resize(floats);  // kept: growing fills with zeros
        product.x = widened.data();
        product.x_stride = stride;
        for (Index first = 0; first < m; first += most, product.y += most * product.n) {
            product.m = std::min(most, m - first);
            float *to = widened.data();
            share_rows(product.m, product.m * k < WORTH_SHARING ? 1 : threads, [&](Index row) {
                widen(x + (first + row) * x_stride, k, to + row * stride);
            });
            product.run(threads);
        }
    }
}

}  // namespace

void linear_panels(Address x, Index x_stride, Address panels, Address bias, Address y, Index m,
                   Index n, Index k, bool wide_output, int threads) {
    const auto run = [&](auto *out) {
        using Y = std::remove_pointer_t<decltype(out)>;
        multiply(Product<Y>{nullptr, at<const bf16>(panels), at<const bf16>(bias), out, m, n, k, x_stride},
                 at<const bf16>(x), threads);
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
