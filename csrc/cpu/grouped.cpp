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
#if defined(__AVX512F__)
constexpr int FLOAT_ROWS = 6;  // whose sums are held in registers
#else
constexpr int FLOAT_ROWS = 2;
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

// out [MT, 32]: of rows of x and of a panel in floats.
template <int MT, class T>
[[gnu::noinline]] void float_tile(const T *x, Index x_stride, const float *weights, Index k, float *out) {
    f32x16 sums[MT][2] = {};
    for (Index i = 0; i < k; ++i)
        for (int v = 0; v < 2; ++v) {
            const f32x16 columns = load16(weights + i * WIDTH + v * 16);
            for (int t = 0; t < MT; ++t) sums[t][v] += columns * to_float(x[t * x_stride + i]);
        }
    for (int t = 0; t < MT; ++t)
        for (int v = 0; v < 2; ++v) store16(out + t * WIDTH + v * 16, sums[t][v]);
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

    // One panel's columns of all rows. Beside them the panel `next` is fetched, if there is one; a
    // single row asks for nothing but weights, which the CPU then fetches faster by itself.
    void rounded_panel(Index panel, Index next) const {
        constexpr Index LINES = W::BLOCK_BYTES / 64;
        const Index tiles = (m + ROUNDED_ROWS - 1) / ROUNDED_ROWS, lines = (LINES + tiles - 1) / tiles;
        Index done = m > 1 && next < w.panels() ? 0 : LINES;
        for_tiles<ROUNDED_ROWS>(m, [&](Index row, auto height) {
            constexpr int MT = decltype(height)::value;
            alignas(64) float sums[MT * WIDTH];
            const Index own = std::min(lines, LINES - done);
            rounded_tile<MT>(w, panel, rounded, row, sums, w.panel(next) + done * 64, int(own));
            done += own;
            put(sums, row, MT, panel);
        });
    }

    void float_panel(Index panel) const {
        static thread_local std::vector<float> weights;
        weights.resize(std::max<std::size_t>(weights.size(), w.k * WIDTH));
        dequantize(w, panel, weights.data());
        for_tiles<FLOAT_ROWS>(m, [&](Index row, auto height) {
            constexpr int MT = decltype(height)::value;
            alignas(64) float sums[MT * WIDTH];
            float_tile<MT>(x + row * x_stride, x_stride, weights.data(), w.k, sums);
            put(sums, row, MT, panel);
        });
    }

    void run(int threads) const {
        if (m * w.n * w.k < WORTH_SHARING) threads = 1;
        const Index tiles = (m + ROUNDED_ROWS - 1) / ROUNDED_ROWS;
        if (rounded.codes)
            share_rows(tiles, threads, [&](Index tile) {
                const Index row = tile * m / tiles, end = (tile + 1) * m / tiles;
                for (Index t = row; t < end; ++t)
                    rounded.put(x + t * x_stride, row, end - row, t - row);
            });
        const Index part = tiles > 1 ? 1 : std::clamp<Index>(w.panels() / (4 * threads), 1, 32);
        share((w.panels() + part - 1) / part, threads, [&](Index b) {
            for (Index p = b * part; p < std::min((b + 1) * part, w.panels()); ++p)
                rounded.codes ? rounded_panel(p, p + 1) : float_panel(p);
        });
    }
};

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
