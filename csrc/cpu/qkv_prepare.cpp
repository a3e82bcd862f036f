// What lies between the projection and attention: norms of heads, rotary embedding, and writing keys
// and values to their slots.

#include <algorithm>
#include <cmath>
#include <vector>

#include "model_ops.h"
#include "pool.h"

namespace {

constexpr Index WORTH_SHARING = 16;  // tokens: waking a thread for fewer costs more

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

}  // namespace

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
        share_rows(tokens, tokens < WORTH_SHARING ? 1 : threads, [&](Index t) {
            prepare.token(t, at<const T>(qkv), at<const T>(q_weight), at<const T>(k_weight),
                          at<T>(k_pool), at<T>(v_pool), at<T>(q));
        });
    });
}
