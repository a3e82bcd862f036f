// y = x W^T + b with W of 4 or 8 bits in panels: 32 columns side by side, in blocks of 32 inputs, each of
// them 8 or 4 times [32 columns, 4 inputs] bytes; of 4 bits, the high halves are the inputs from 16 on.
// A sum lies in one lane from the first block to the last, so its order depends on nothing but k.

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "model_ops.h"
#include "pool.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr Index WIDTH = 32, BLOCK = 32;  // columns of a panel; inputs that are rounded together
constexpr int QUADS = 8;                 // of a block
constexpr Index WORTH_SHARING = 500000;  // products: waking a thread for fewer costs more
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 6;  // whose sums are held in registers
#else
constexpr int MOST_ROWS = 2;
#endif

struct half {
    uint16_t bits;
};

inline f32x16 load_numbers(const float *p) { return load16(p); }
inline f32x16 load_numbers(const half *p) {  // finite ones
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_as<u16x16>(p));
#else
    const u32x16 bits = __builtin_convertvector(load_as<u16x16>(p), u32x16);
    const f32x16 size = (f32x16)((bits & 0x7fff) << 13) * 0x1p112f;
    return (f32x16)((u32x16)size | (bits & 0x8000) << 16);
#endif
}

// sums + the products of four bytes without sign in each lane of `codes` with four that have one.
inline i32x16 add_dots(i32x16 sums, u32x16 codes, int32_t four) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    const u32x16 even = codes & 0x00ff00ff, odd = (codes >> 8) & 0x00ff00ff;
    const auto pair = [&](int first, int second) {
        return int32_t(uint32_t(uint16_t(int8_t(four >> first))) |
                       uint32_t(uint16_t(int8_t(four >> second))) << 16);
    };
    const int32_t own[2] = {pair(0, 16), pair(8, 24)};
    const u32x16 pairs[2] = {even, odd};
    for (int i = 0; i < 2; ++i) {
#if defined(__AVX512BW__)
        sums += (i32x16)_mm512_madd_epi16((__m512i)pairs[i], _mm512_set1_epi32(own[i]));
#else
        __m256i halves[2], products[2];
        std::memcpy(halves, &pairs[i], sizeof halves);
        for (int h = 0; h < 2; ++h)
            products[h] = _mm256_madd_epi16(halves[h], _mm256_set1_epi32(own[i]));
        sums += load_as<i32x16>(products);
#endif
    }
    return sums;
#else
    for (int b = 0; b < 4; ++b)
        sums += (i32x16)((codes >> 8 * b) & 255) * int32_t(int8_t(four >> 8 * b));
    return sums;
#endif
}

// x [k] as multiples, up to 127, of scales of its blocks, and the sums of those multiples.
template <class T>
void round_row(const T *x, Index k, int8_t *codes, float *scales, int32_t *sums) {
    for (Index b = 0; b < k / BLOCK; ++b, x += BLOCK, codes += BLOCK) {
        float largest = 0.0f;
        for (Index i = 0; i < BLOCK; ++i) {
            const float size = std::fabs(to_float(x[i]));
            if (!(size <= largest)) largest = largest == largest ? size : largest;  // NaN stays
        }
        const float inverse = largest > 0x1p-120f ? 127.0f / largest : 0.0f;  // else it is infinite
        int32_t sum = 0;
        for (Index i = 0; i < BLOCK; ++i) {
            codes[i] = int8_t(std::lrint(to_float(x[i]) * inverse));  // ties to even
            sum += codes[i];
        }
        scales[b] = largest / 127.0f;
        sums[b] = sum;
    }
}

// BITS: of a code. S: of scales and minimums. No minimums: they are -2^(BITS - 1) times the scale.
template <int BITS, class S>
struct Weights {
    static constexpr Index BLOCK_BYTES = BLOCK * WIDTH * BITS / 8;
    const uint8_t *codes;
    const S *scales, *minimums;  // [n / 32, k / group, 32]
    Index n, k, group;

    Index scale_at(Index panel, Index block) const {
        return (panel * (k / group) + block * BLOCK / group) * WIDTH;
    }

    // The four inputs from 4 quad on of sixteen columns.
    static u32x16 load_quad(const uint8_t *block, int quad, int v) {
        if constexpr (BITS == 8) return load_as<u32x16>(block + (quad * WIDTH + v * 16) * 4);
        const u32x16 both = load_as<u32x16>(block + (quad % 4 * WIDTH + v * 16) * 4);
        return (quad < 4 ? both : both >> 4) & 0x0f0f0f0f;
    }

    // A panel in floats, [k, 32].
    void dequantize(Index panel, float *out) const {
        const uint8_t *from = codes + panel * (k / BLOCK) * BLOCK_BYTES;
        for (Index b = 0; b < k / BLOCK; ++b, from += BLOCK_BYTES)
            for (int v = 0; v < 2; ++v) {
                const Index s = scale_at(panel, b) + v * 16;
                const f32x16 scale = load_numbers(scales + s);
                const f32x16 least =
                    minimums ? load_numbers(minimums + s) : scale * -float(1 << (BITS - 1));
                for (int q = 0; q < QUADS; ++q) {
                    const u32x16 quad = load_quad(from, q, v);
                    for (int i = 0; i < 4; ++i) {
                        const i32x16 code = (i32x16)((quad >> 8 * i) & 255);
                        store16(out + (b * BLOCK + q * 4 + i) * WIDTH + v * 16,
                                __builtin_convertvector(code, f32x16) * scale + least);
                    }
                }
            }
    }

    // One row, [k].
    template <class T>
    void embed(Index row, T *out) const {
        const Index panel = row / WIDTH, v = row % WIDTH / 16;
        const uint8_t *from = codes + panel * (k / BLOCK) * BLOCK_BYTES;
        for (Index b = 0; b < k / BLOCK; ++b, from += BLOCK_BYTES) {
            const Index s = scale_at(panel, b) + v * 16;
            const float scale = load_numbers(scales + s)[row % 16];
            const float least = minimums ? load_numbers(minimums + s)[row % 16]
                                         : scale * -float(1 << (BITS - 1));
            for (int q = 0; q < QUADS; ++q) {
                const uint32_t quad = load_quad(from, q, int(v))[row % 16];
                for (int i = 0; i < 4; ++i)
                    store(out + b * BLOCK + q * 4 + i, float(quad >> 8 * i & 255) * scale + least);
            }
        }
    }
};

template <class W, class T, class Y>
struct Product {
    W w;
    const T *x, *bias;
    Y *y;
    Index m, x_stride;
    int8_t *x_codes;  // of rounded x: null where it is not
    float *x_scales;
    int32_t *x_sums;
    static constexpr int BITS = W::BLOCK_BYTES * 8 / BLOCK / WIDTH;

    template <int MT>
    [[gnu::noinline]] void rounded_tile(Index row, Index panel) const {
        const Index blocks = w.k / BLOCK;
        const uint8_t *codes = w.codes + panel * blocks * W::BLOCK_BYTES;
        const int8_t *own = x_codes + row * w.k;
        f32x16 sums[MT][2] = {};
        for (Index b = 0; b < blocks; ++b, codes += W::BLOCK_BYTES, own += BLOCK) {
            i32x16 dots[MT][2];
            for (int t = 0; t < MT; ++t) {
                const int32_t zero = w.minimums ? 0 : x_sums[(row + t) * blocks + b] << (BITS - 1);
                dots[t][0] = dots[t][1] = i32x16{} - zero;
            }
#pragma GCC unroll 8
            for (int q = 0; q < QUADS; ++q)
                for (int v = 0; v < 2; ++v) {
                    const u32x16 quad = W::load_quad(codes, q, v);
                    for (int t = 0; t < MT; ++t)
                        dots[t][v] =
                            add_dots(dots[t][v], quad, load_as<int32_t>(own + t * w.k + q * 4));
                }
            const Index s = w.scale_at(panel, b);
            for (int v = 0; v < 2; ++v) {
                const f32x16 scale = load_numbers(w.scales + s + v * 16);
                const f32x16 least = w.minimums ? load_numbers(w.minimums + s + v * 16) : f32x16{};
                for (int t = 0; t < MT; ++t) {
                    const Index at = (row + t) * blocks + b;
                    f32x16 whole = __builtin_convertvector(dots[t][v], f32x16) * scale;
                    if (w.minimums) whole += least * float(x_sums[at]);
                    sums[t][v] += whole * x_scales[at];
                }
            }
        }
        put(sums, row, panel);
    }

    template <int MT>
    [[gnu::noinline]] void float_tile(Index row, Index panel, const float *weights) const {
        const T *own = x + row * x_stride;
        f32x16 sums[MT][2] = {};
        for (Index i = 0; i < w.k; ++i)
            for (int v = 0; v < 2; ++v) {
                const f32x16 columns = load16(weights + i * WIDTH + v * 16);
                for (int t = 0; t < MT; ++t)
                    sums[t][v] += columns * to_float(own[t * x_stride + i]);
            }
        put(sums, row, panel);
    }

    template <int MT>
    void put(const f32x16 (&sums)[MT][2], Index row, Index panel) const {
        for (int v = 0; v < 2; ++v) {
            const Index column = panel * WIDTH + v * 16;
            for (int t = 0; t < MT; ++t) {
                Y *to = y + (row + t) * w.n;
                if (column + 16 <= w.n) {
                    store16(to + column, bias ? sums[t][v] + load16(bias + column) : sums[t][v]);
                    continue;
                }
                for (Index c = column; c < w.n; ++c)
                    store(to + c, sums[t][v][c - column] + (bias ? to_float(bias[c]) : 0.0f));
            }
        }
    }

    void panel(Index p) const {
        static thread_local std::vector<float> weights;
        if (!x_codes) {
            weights.resize(std::max<std::size_t>(weights.size(), w.k * WIDTH));
            w.dequantize(p, weights.data());
        }
        for (Index row = 0; row < m;) {
            const auto tile = [&](auto height) {
                constexpr int MT = decltype(height)::value;
                x_codes ? rounded_tile<MT>(row, p) : float_tile<MT>(row, p, weights.data());
                row += MT;
            };
            const Index left = m - row;
            if (left >= MOST_ROWS)
                tile(std::integral_constant<int, MOST_ROWS>{});
            else if (left >= 4 && MOST_ROWS > 4)
                tile(std::integral_constant<int, std::min(4, MOST_ROWS)>{});
            else if (left >= 2)
                tile(std::integral_constant<int, 2>{});
            else
                tile(std::integral_constant<int, 1>{});
        }
    }

    void run(int threads) const {
        const Index panels = (w.n + WIDTH - 1) / WIDTH;
        if (m * w.n * w.k < WORTH_SHARING) threads = 1;
        if (x_codes)
            share_rows(m, m > MOST_ROWS ? threads : 1, [&](Index r) {
                const Index b = r * (w.k / BLOCK);
                round_row(x + r * x_stride, w.k, x_codes + r * w.k, x_scales + b, x_sums + b);
            });
        const Index part = m > MOST_ROWS ? 1 : std::clamp<Index>(panels / (4 * threads), 1, 32);
        share((panels + part - 1) / part, threads, [&](Index b) {
            for (Index p = b * part; p < std::min((b + 1) * part, panels); ++p) panel(p);
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
                Product<decltype(w), T, Y>{
                    w, at<const T>(x), at<const T>(bias), out, m, x_stride, at<int8_t>(x_codes),
                    at<float>(x_scales), at<int32_t>(x_sums)}
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
                w.embed(id, at<decltype(type)>(out) + t * k);
            }
        });
    });
}
