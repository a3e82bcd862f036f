// The decoder's ops on a CPU, in bf16 or fp32 with fp32 arithmetic. The Python twins are the
// references of minisgl/kernels; the callers there check shapes. Tensors come as addresses.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "model_ops.h"
#include "tape.h"

namespace py = pybind11;

namespace {

// ---------------------------------------------------------------------------------------------
// y = x W^T + b. x is unpacked to fp32 once; each thread takes blocks of W's rows and holds
// `MT x NT` sums in registers. A sum's order depends on nothing but the length of the rows, so a
// token's result is the same in any batch.

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
    if (m * n * k < 500000) threads = 1;  // waking a thread costs more
    const Index share = (n / (2 * threads) + 3) / 4 * 4;
    const Index block = std::clamp<Index>(share, 4, 64);
    const Linear<T, Y> linear{buffer, w, bias, y, m, n, k, stride};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (Index row = 0; row < m; ++row) {
            const T *from = x + row * x_stride;
            float *to = buffer + row * stride;
            for (Index i = 0; i < padded; i += 32) {
                T rest[32] = {};
                if (i + 32 > k) std::copy(from + i, from + k, rest);
                store16(to + i, load_first(i + 32 > k ? rest : from + i));
                store16(to + i + 16, load_second(i + 32 > k ? rest : from + i));
            }
        }
#pragma omp for schedule(static)
        for (Index begin = 0; begin < n; begin += block)
            linear.block(begin, std::min(begin + block, n));
    }
}

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

// ---------------------------------------------------------------------------------------------
// Normalisation, activation, and what lies between the projection and attention.

constexpr Index WORTH_THREADS = 1 << 16;  // elements: waking a thread for fewer costs more

template <class T>
float mean_square(const T *x, Index n) {
    f32x16 sums = {};
    Index i = 0;
    for (; i + 16 <= n; i += 16) {
        const f32x16 v = load16(x + i);
        sums += v * v;
    }
    float total = sum(sums);
    for (; i < n; ++i) total += to_float(x[i]) * to_float(x[i]);
    return total / float(n);
}

template <class T>
void run_rmsnorm(const T *x, Index x_stride, const T *weight, const T *residual,
                 Index residual_stride, T *y, T *total, Index rows, Index n, float eps, float offset,
                 int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n >= WORTH_THREADS)
    for (Index row = 0; row < rows; ++row) {
        const T *from = x + row * x_stride;
        if (residual) {
            const T *other = residual + row * residual_stride;
            T *added = total + row * n;
            Index i = 0;
            for (; i + 16 <= n; i += 16) store16(added + i, load16(from + i) + load16(other + i));
            for (; i < n; ++i) store(added + i, to_float(from[i]) + to_float(other[i]));
            from = added;
        }
        const float scale = 1.0f / std::sqrt(mean_square(from, n) + eps);
        T *to = y + row * n;
        Index i = 0;
        for (; i + 16 <= n; i += 16)
            store16(to + i, load16(from + i) * scale * (load16(weight + i) + offset));
        for (; i < n; ++i) store(to + i, to_float(from[i]) * scale * (to_float(weight[i]) + offset));
    }
}

void rmsnorm(Address x, Index x_stride, Address weight, Address residual, Index residual_stride,
             Address y, Address total, Index rows, Index n, float eps, bool unit_offset, bool is_bf16,
             int threads) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        run_rmsnorm(at<const T>(x), x_stride, at<const T>(weight), at<const T>(residual),
                    residual_stride, at<T>(y), at<T>(total), rows, n, eps,
                    unit_offset ? 1.0f : 0.0f, threads);
    });
}

// x / (1 + e^-x), and x times the tanh approximation of the normal distribution, which is
// x / (1 + e^-2u). Both divide by 1 + e^-|z| so that exp's argument is never positive.
template <bool GELU>
f32x16 gate(f32x16 x) {
    const f32x16 z = GELU ? x * 1.5957691216057308f * (1.0f + 0.044715f * x * x) : x;
    const f32x16 small = exp16(z > 0.0f ? -z : z);
    return x * (z > 0.0f ? splat(1.0f) : small) / (1.0f + small);
}

template <class T, bool GELU>
void run_gated(const T *x, Index x_stride, T *y, Index rows, Index n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n >= WORTH_THREADS)
    for (Index row = 0; row < rows; ++row) {
        const T *gates = x + row * x_stride, *ups = gates + n;
        T *to = y + row * n;
        Index i = 0;
        for (; i + 16 <= n; i += 16)
            store16(to + i, gate<GELU>(load16(gates + i)) * load16(ups + i));
        for (; i < n; ++i)
            store(to + i, gate<GELU>(splat(to_float(gates[i])))[0] * to_float(ups[i]));
    }
}

void gated(Address x, Index x_stride, Address y, Index rows, Index n, bool gelu, bool is_bf16,
           int threads) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        if (gelu)
            run_gated<T, true>(at<const T>(x), x_stride, at<T>(y), rows, n, threads);
        else
            run_gated<T, false>(at<const T>(x), x_stride, at<T>(y), rows, n, threads);
    });
}

struct Prepare {
    const Index *positions;
    const float *cos_sin;
    const Index *slots;
    Index q_heads, kv_heads, head_dim, rotary_dim;
    float eps, offset;
    bool interleaved;

    template <class T>
    void head(const T *from, const T *weight, const float *table, float *work, T *to) const {
        const float scale = weight ? 1.0f / std::sqrt(mean_square(from, head_dim) + eps) : 1.0f;
        Index i = 0;
        for (; i + 16 <= head_dim; i += 16) {
            const f32x16 x = load16(from + i);
            store16(work + i, weight ? x * (scale * (load16(weight + i) + offset)) : x);
        }
        for (; i < head_dim; ++i)
            work[i] = to_float(from[i]) * (weight ? scale * (to_float(weight[i]) + offset) : 1.0f);
        rotate(table, work);
        for (i = 0; i + 16 <= head_dim; i += 16) store16(to + i, load16(work + i));
        for (; i < head_dim; ++i) store(to + i, work[i]);
    }

    void rotate(const float *table, float *work) const {
        const Index half = rotary_dim / 2;
        Index i = 0;
        for (; !interleaved && i + 16 <= half; i += 16) {
            const f32x16 c = load16(table + i), s = load16(table + half + i);
            const f32x16 a = load16(work + i), b = load16(work + half + i);
            store16(work + i, a * c - b * s);
            store16(work + half + i, b * c + a * s);
        }
        for (; i < half; ++i) {
            const Index first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
            const float c = table[i], s = table[half + i], a = work[first], b = work[second];
            work[first] = a * c - b * s;
            work[second] = b * c + a * s;
        }
    }

    template <class T>
    void token(Index t, const T *qkv, const T *q_weight, const T *k_weight, T *k_pool, T *v_pool,
               T *q) const {
        static thread_local std::vector<float> work;
        work.resize(head_dim);
        const T *from = qkv + t * (q_heads + 2 * kv_heads) * head_dim;
        const float *table = cos_sin + positions[t] * rotary_dim;
        T *to = q + t * q_heads * head_dim;
        for (Index h = 0; h < q_heads; ++h, from += head_dim, to += head_dim)
            head(from, q_weight, table, work.data(), to);
        if (slots[t] < 0) return;
        const Index width = kv_heads * head_dim;
        T *keys = k_pool + slots[t] * width;
        for (Index h = 0; h < kv_heads; ++h)
            head(from + h * head_dim, k_weight, table, work.data(), keys + h * head_dim);
        std::copy(from + width, from + 2 * width, v_pool + slots[t] * width);
    }
};

void qkv_prepare(Address qkv, Address positions, Address cos_sin, Address k_pool, Address v_pool,
                 Address slots, Address q_weight, Address k_weight, Address q, Index tokens,
                 Index q_heads, Index kv_heads, Index head_dim, Index rotary_dim, float eps,
                 bool unit_offset, bool interleaved, bool is_bf16, int threads) {
    const Prepare prepare{at<const Index>(positions), at<const float>(cos_sin),
                          at<const Index>(slots),     q_heads,
                          kv_heads,                   head_dim,
                          rotary_dim,                 eps,
                          unit_offset ? 1.0f : 0.0f,  interleaved};
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens >= 16)
        for (Index t = 0; t < tokens; ++t)
            prepare.token(t, at<const T>(qkv), at<const T>(q_weight), at<const T>(k_weight),
                          at<T>(k_pool), at<T>(v_pool), at<T>(q));
    });
}

}  // namespace

PYBIND11_MODULE(model_ops, m) {
    m.attr("HEAD_DIMS") = py::make_tuple(16, 32, 64, 80, 96, 128, 256);
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
    m.attr("BF16_ARITHMETIC") = true;  // of the CPU, which PyTorch's products then use
#else
    m.attr("BF16_ARITHMETIC") = false;
#endif
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("linear", recorded(&linear), unlocked, "y [m, n] = x [m, k] w [n, k]^T + bias [n]");
    m.def("linear_panels", recorded(&linear_panels), unlocked, "the same with w in panels of 32 rows");
    m.def("rmsnorm", recorded(&rmsnorm), unlocked, "minisgl.kernels.rmsnorm on rows");
    m.def("gated", recorded(&gated), unlocked, "minisgl.kernels.activation on rows");
    m.def("qkv_prepare", recorded(&qkv_prepare), unlocked, "minisgl.kernels.qkv_prepare");
    m.def("attention", recorded(&attention), unlocked, "minisgl.kernels.attention, in bf16");
    m.def("decode", recorded(&decode), unlocked, "minisgl.kernels.decode");
    m.def("prepare_inputs", recorded(&prepare_inputs), unlocked, "minisgl.kernels.advance");
    m.def("accept_and_advance", recorded(&accept_and_advance), unlocked, "minisgl.kernels.advance");
    m.def("embed_panels", recorded(&embed_panels), unlocked, "rows of a weight in panels");
    py::class_<Tape>(m, "Tape")
        .def(py::init<>())
        .def("__len__", [](const Tape &tape) { return tape.size(); })
        .def_property_readonly("address", [](Tape &tape) { return Address(&tape); })
        .def("call",
             [](Tape &tape, py::function call) {
                 auto kept = std::make_shared<py::function>(std::move(call));
                 tape.push_back([kept] {
                     py::gil_scoped_acquire held;
                     (*kept)();
                 });
             })
        .def("replay",
             [](const Tape &tape) {
                 for (const auto &call : tape) call();
             },
             unlocked);
    bind_recording(m);
}
