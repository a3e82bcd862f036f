// y = x W^T + b with W of 4 or 8 bits in panels, its inputs rounded to 8 bits or left as they are; and rows
// out of panels.

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "grouped.h"
#include "pool.h"

namespace {

constexpr Index WORTH_SHARING = 500000;  // products: waking a thread for fewer costs more

// One row, [k].
template <class W, class T>
void embed(const W &w, Index row, T *out) {
    const Index panel = row / WIDTH, v = row % WIDTH / 16;
    const uint8_t *from = w.panel(panel);
    for (Index b = 0; b < w.k / BLOCK; ++b, from += W::BLOCK_BYTES) {
        const Index s = w.scale_at(panel, b) + v * 16;
        const float scale = load_numbers(w.scales + s)[row % 16];
        const float least = w.minimums ? load_numbers(w.minimums + s)[row % 16]
                                       : scale * -float(1 << (W::BITS - 1));
        for (int q = 0; q < QUADS; ++q) {
            const uint32_t quad = W::load_quad(from, q, int(v))[row % 16];
            for (int i = 0; i < 4; ++i)
                store(out + b * BLOCK + q * 4 + i, float(quad >> 8 * i & 255) * scale + least);
        }
    }
}

template <class W, class T, class Y>
struct Product {
    W w;
    const T *x, *bias;
    Y *y;
    Index m, x_stride;
    Rounded rounded;  // x, or of null where it is not

    // The sums [rows, 32] of a panel, or those of them that are columns of y.
    void put(const float *sums, Index row, Index rows, Index panel) const {
        for (Index t = 0; t < rows; ++t, sums += WIDTH)
            for (int v = 0; v < 2; ++v) {
                const Index column = panel * WIDTH + v * 16;
                const f32x16 own = load16(sums + v * 16);
                Y *to = y + (row + t) * w.n;
                if (column + 16 <= w.n) {
                    store16(to + column, bias ? own + load16(bias + column) : own);
                    continue;
                }
                for (Index c = column; c < w.n; ++c)
                    store(to + c, own[c - column] + (bias ? to_float(bias[c]) : 0.0f));
            }
    }

    const T *row(Index i) const { return x + i * x_stride; }

    void panel(Index panel) const {
        const auto own = [&](const float *sums, Index row, Index rows) { put(sums, row, rows, panel); };
        if (rounded.codes)
            rounded_panel(w, panel, rounded, 0, m, own);
        else
            float_panel(w, panel, [&](Index i) { return row(i); }, m, own);
    }

    void run(int threads) const {
        if (m * w.n * w.k < WORTH_SHARING) threads = 1;
        const Index tiles = (m + ROUNDED_ROWS - 1) / ROUNDED_ROWS;
        if (rounded.codes)
            share_rows(tiles, threads, [&](Index tile) {
                rounded.put_tile([&](Index i) { return row(i); }, 0, m, tile);
            });
        const Index part = tiles > 1 ? 1 : std::clamp<Index>(w.panels() / (4 * threads), 1, 32);
        share((w.panels() + part - 1) / part, threads, [&](Index b) {
            for (Index p = b * part; p < std::min((b + 1) * part, w.panels()); ++p) panel(p);
        });
    }
};

}  // namespace

void grouped_linear(Address x, Index x_stride, Address codes, Address scales, Address minimums,
                    Address bias, Address x_codes, Address x_scales, Address x_sums, Address y,
                    Index m, Index n, Index k, Index group, int bits, bool is_half, bool is_bf16,
                    bool wide_output, int threads) {
    with_weights(codes, scales, minimums, n, k, group, bits, is_half, [&](auto w) {
        with_type(is_bf16, [&](auto type) {
            using T = decltype(type);
            const auto run = [&](auto *out) {
                using Y = std::remove_pointer_t<decltype(out)>;
                const Rounded rounded{at<int8_t>(x_codes), at<float>(x_scales), at<float>(x_sums),
                                      k, minimums ? 1.0f : -float(1 << (bits - 1))};
                Product<decltype(w), T, Y>{w, at<const T>(x), at<const T>(bias), out, m, x_stride, rounded}
                    .run(threads);
            };
            if (wide_output)
                run(at<float>(y));
            else
                run(at<T>(y));
        });
    });
}

void embed_grouped(Address ids, Address codes, Address scales, Address minimums, Address out,
                   Index tokens, Index num_rows, Index k, Index group, int bits, bool is_half,
                   bool is_bf16) {
    with_weights(codes, scales, minimums, num_rows, k, group, bits, is_half, [&](auto w) {
        with_type(is_bf16, [&](auto type) {
            for (Index t = 0; t < tokens; ++t) {
                const Index id = at<const int32_t>(ids)[t];
                if (id < 0 || id >= num_rows)
                    throw pybind11::index_error("token id " + std::to_string(id) +
                                                " has no embedding");
                embed(w, id, at<decltype(type)>(out) + t * k);
            }
        });
    });
}
