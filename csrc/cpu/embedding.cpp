// Rows of an embedding that is not in panels, of which a rank may hold a part; and what is done to rows.

#include <cstring>

#include "model_ops.h"
#include "pool.h"

void embed_dense(Address ids, Address weight, Address out, Index tokens, Index num_rows, Index row_bytes) {
    for (Index t = 0; t < tokens; ++t) {
        const Index id = at<const std::int32_t>(ids)[t];
        if (id < 0 || id >= num_rows)
            throw pybind11::index_error("token id " + std::to_string(id) + " has no embedding");
        std::memcpy(at<char>(out) + t * row_bytes, at<const char>(weight) + id * row_bytes, row_bytes);
    }
}

void local_ids(Address ids, Address out, Index tokens, Index first, Index count) {
    for (Index t = 0; t < tokens; ++t) {
        const Index id = at<const std::int32_t>(ids)[t] - first;
        at<std::int32_t>(out)[t] = id >= 0 && id < count ? std::int32_t(id) : 0;
    }
}

void finish_rows(Address ids, Address rows, Index tokens, Index n, Index first, Index count, float scale,
                 bool is_bf16, int threads) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        share_rows(tokens, tokens * n < (1 << 15) ? 1 : threads, [&](Index t) {
            const Index id = at<const std::int32_t>(ids)[t] - first;
            T *x = at<T>(rows) + t * n;
            if (id < 0 || id >= count) {
                std::memset(x, 0, n * sizeof(T));
                return;
            }
            Index i = 0;
            for (; i + 16 <= n; i += 16) store16(x + i, load16(x + i) * scale);
            for (; i < n; ++i) store(x + i, to_float(x[i]) * scale);
        });
    });
}
