// The activation of a gated MLP: act(gate) * up, of rows that hold a gate and an up of n values.

#include "gate.h"
#include "model_ops.h"
#include "pool.h"

namespace {

constexpr Index WORTH_SHARING = 1 << 16;  // elements: waking a thread for fewer costs more

template <class T, bool GELU>
void run_gated(const T *x, Index x_stride, T *y, Index rows, Index n, int threads) {
    if (rows * n < WORTH_SHARING) threads = 1;
    share_rows(rows, threads, [&](Index row) {
        const T *gates = x + row * x_stride, *ups = gates + n;
        T *to = y + row * n;
        Index i = 0;
        for (; i + 16 <= n; i += 16)
            store16(to + i, gate<GELU>(load16(gates + i)) * load16(ups + i));
        for (; i < n; ++i)
            store(to + i, gate<GELU>(splat(to_float(gates[i])))[0] * to_float(ups[i]));
    });
}

}  // namespace

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
