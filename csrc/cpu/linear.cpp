// y = x W^T + b with W as it is. x is unpacked to fp32 once; each thread takes blocks of W's rows and
// holds `MT x NT` sums in registers. A sum's order depends on nothing but the length of the rows, so a
// token's result is the same in any batch.

#include <algorithm>
#include <vector>

#include "model_ops.h"
#include "pool.h"

namespace {

constexpr Index WORTH_SHARING = 500000;  // products: waking a thread for fewer costs more
constexpr Index TILE_M = 6;

template <class T, int MT, int NT>
[[gnu::noinline]] void tile(const float *x, Index x_stride, const T *w, Index w_stride, Index k, float *out) {
    f32x16 sums[MT][NT] = {};
    const auto add = [&](const float *from, const f32x16(&columns)[NT]) {
        for (int m = 0; m < MT; ++m) {
            const f32x16 row = load16(from + m * x_stride);
            for (int n = 0; n < NT; ++n) sums[m][n] += row * columns[n];
        }
    };
    for (Index i = 0; i < k; i += 32) {  // halves in turn: both at once do not fit the registers
        f32x16 columns[NT];
        for (int n = 0; n < NT; ++n) prefetch(w, (NT + n) * w_stride + i);
        for (int n = 0; n < NT; ++n) columns[n] = load_first(w + n * w_stride + i);
        add(x + i, columns);
        for (int n = 0; n < NT; ++n) columns[n] = load_second(w + n * w_stride + i);
        add(x + i + 16, columns);
    }
    for (int m = 0; m < MT; ++m) {
        if constexpr (NT == 4)
            sum4(sums[m], out + m * NT);
        else
            for (int n = 0; n < NT; ++n) out[m * NT + n] = sum(sums[m][n]);
    }
}

template <class T, class Y>
struct Linear {
    const float *x;  // [m, padded k], unpacked half by half
    const T *w;      // [n, k]
    const T *bias;   // [n] or null
    Y *y;            // [m, n]
    Index m, n, k, x_stride;

    // Rows [row, row + MT) of columns [column, column + NT), the first `skip` of which are there.
    template <int MT, int NT>
    void rows(Index row, Index column, Index skip, const T *w_tail) const {
        float out[MT * NT];
        const Index whole = k / 32 * 32;
        tile<T, MT, NT>(x + row * x_stride, x_stride, w + column * k, k, whole, out);
        if (whole < k) {
            float rest[MT * NT];
            tile<T, MT, NT>(x + row * x_stride + whole, x_stride, w_tail, 32, 32, rest);
            for (int i = 0; i < MT * NT; ++i) out[i] += rest[i];
        }
        for (int i = 0; i < MT; ++i)
            for (Index j = skip; j < NT; ++j) {
                const float b = bias ? to_float(bias[column + j]) : 0.0f;
                store(y + (row + i) * n + column + j, out[i * NT + j] + b);
            }
    }

    template <int NT>
    void columns(Index row, Index count, Index column, Index skip) const {
        T w_tail[NT * 32] = {};  // the last k % 32 of each column's row, padded with zeros
        const Index whole = k / 32 * 32;
        if (whole < k)
            for (int j = 0; j < NT; ++j)
                std::copy(w + (column + j) * k + whole, w + (column + j + 1) * k, w_tail + j * 32);
        if constexpr (NT == 1) {
            for (Index i = 0; i < count; ++i) rows<1, 1>(row + i, column, skip, w_tail);
            return;
        }
        switch (count) {
            case 1: return rows<1, NT>(row, column, skip, w_tail);
            case 2: return rows<2, NT>(row, column, skip, w_tail);
            case 3: return rows<3, NT>(row, column, skip, w_tail);
            case 4: return rows<4, NT>(row, column, skip, w_tail);
            case 5: return rows<5, NT>(row, column, skip, w_tail);
            default: return rows<6, NT>(row, column, skip, w_tail);
        }
    }

    // Columns [begin, end), tile by tile: a tile of x stays in the first cache, the columns in
    // the second. The last four columns overlap the four before where they are not a whole tile.
    void block(Index begin, Index end) const {
        const Index tiles = (m + TILE_M - 1) / TILE_M;
        for (Index t = 0; t < tiles; ++t) {
            const Index row = t * m / tiles, count = (t + 1) * m / tiles - row;
            if (n < 4) {
                for (Index column = begin; column < end; ++column) columns<1>(row, count, column, 0);
                continue;
            }
            for (Index column = begin; column < end; column += 4) {
                const Index from = std::min(column, n - 4);
                columns<4>(row, count, from, column - from);
            }
        }
    }
};

template <class T, class Y>
void run_linear(const T *x, Index x_stride, const T *w, const T *bias, Y *y, Index m, Index n,
                Index k, int threads) {
    static thread_local std::vector<float> unpacked;
    const Index padded = (k + 31) / 32 * 32;
    const Index stride = padded + 16;  // no two rows in one set of the cache
    unpacked.resize(m * stride + 16);
    float *buffer = unpacked.data();
    buffer += (64 - reinterpret_cast<Address>(buffer) % 64) % 64 / sizeof(float);
    if (m * n * k < WORTH_SHARING) threads = 1;
    share_rows(m, threads, [&](Index row) {
        const T *from = x + row * x_stride;
        float *to = buffer + row * stride;
        for (Index i = 0; i < padded; i += 32) {
            T rest[32] = {};
            if (i + 32 > k) std::copy(from + i, from + k, rest);
            store16(to + i, load_first(i + 32 > k ? rest : from + i));
            store16(to + i + 16, load_second(i + 32 > k ? rest : from + i));
        }
    });
    const Index part = (n / (2 * threads) + 3) / 4 * 4;
    const Index block = std::clamp<Index>(part, 4, 64);
    const Linear<T, Y> linear{buffer, w, bias, y, m, n, k, stride};
    share((n + block - 1) / block, threads, [&](Index b) {
        linear.block(b * block, std::min((b + 1) * block, n));
    });
}

}  // namespace

void linear(Address x, Index x_stride, Address w, Address bias, Address y, Index m, Index n,
            Index k, bool is_bf16, bool wide_output, int threads) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        if (wide_output)
            run_linear(at<const T>(x), x_stride, at<const T>(w), at<const T>(bias), at<float>(y),
                       m, n, k, threads);
        else
            run_linear(at<const T>(x), x_stride, at<const T>(w), at<const T>(bias), at<T>(y), m,
                       n, k, threads);
    });
}
