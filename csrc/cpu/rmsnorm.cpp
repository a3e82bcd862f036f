// Root mean square normalisation of rows, with an addition before it where there is a residual.

#include <cmath>

#include "model_ops.h"
#include "pool.h"

namespace {

constexpr Index WORTH_SHARING = 1 << 16;  // elements: waking a thread for fewer costs more

template <class T>
void run_rmsnorm(const T *x, Index x_stride, const T *weight, const T *residual,
                 Index residual_stride, T *y, T *total, Index rows, Index n, float eps, float offset,
                 int threads) {
    if (rows * n < WORTH_SHARING) threads = 1;
    share_rows(rows, threads, [&](Index row) {
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
    });
}

}  // namespace

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
