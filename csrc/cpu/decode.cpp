// Decode attention: per sequence and key head, all scores, then softmax, then the weighted sum.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "model_ops.h"
#include "pool.h"

namespace {

constexpr Index WORTH_SHARING = 20000;  // vectors of keys: waking a thread for fewer costs more

struct Decode {
    const std::int32_t *page_table, *rows, *lengths;
    Index table_stride, q_stride, width, q_heads, kv_heads, page_size;
    float scale, softcap;  // softcap 0: none
    Index window;          // 0: none

    // Queries of `groups * width` rows against one key head; DV vectors make a head.
    template <class T, int DV>
    void item(Index s, Index kv_head, const T *q, const T *k_pool, const T *v_pool, T *out,
              float *lse, std::vector<float> &scores) const {
        constexpr Index D = DV * 16;
        constexpr int R = DV <= 8 ? 2 : 1;  // rows of queries in registers
        const Index groups = q_heads / kv_heads, length = lengths[s];
        const Index past = length - width;  // position of the first query
        // From a multiple of 16, so that a key has the same lane whatever queries come along.
        const Index first = window ? std::max<Index>(past - window + 1, 0) / 16 * 16 : 0;
        const Index count = std::max<Index>(length - first, 0), padded = (count + 15) / 16 * 16;
        const std::int32_t *pages = page_table + rows[s] * table_stride;
        const Index step = kv_heads * D;
        scores.resize(R * padded + 16);
        float *x = scores.data();
        const Index num_rows = groups * width;
        for (Index row = 0; row < num_rows; row += R) {
            const int have = int(std::min<Index>(R, num_rows - row));
            Index token[R], head[R];
            f32x16 queries[R][DV];
            for (int r = 0; r < R; ++r) {
                const Index own = row + std::min(r, have - 1);
                token[r] = s * width + own / groups;
                head[r] = kv_head * groups + own % groups;
                for (int d = 0; d < DV; ++d)
                    queries[r][d] = load16(q + token[r] * q_stride + head[r] * D + d * 16) * scale;
            }
            for_keys(pages, first, length, k_pool + kv_head * D, step, D, [&](Index j, const T *key) {
                f32x16 sums[R] = {};
                for (int d = 0; d < DV; ++d) {
                    const f32x16 part = load16(key + d * 16);
                    for (int r = 0; r < R; ++r) sums[r] += queries[r][d] * part;
                }
                for (int r = 0; r < R; ++r) x[r * padded + j - first] = sum(sums[r]);
            });
            float totals[R], largest[R];
            for (int r = 0; r < R; ++r) {
                const Index position = past + (row + std::min(r, have - 1)) / groups;
                const Index lo = window ? std::max<Index>(position - window + 1, 0) - first : 0;
                softmax(x + r * padded, count, padded, lo, position + 1 - first, totals[r],
                        largest[r]);
            }
            f32x16 sums[R][DV] = {};
            for_keys(pages, first, length, v_pool + kv_head * D, step, D, [&](Index j, const T *value) {
                for (int d = 0; d < DV; ++d) {
                    const f32x16 part = load16(value + d * 16);
                    for (int r = 0; r < R; ++r) sums[r][d] += part * x[r * padded + j - first];
                }
            });
            for (int r = 0; r < have; ++r) {
                const float inverse = totals[r] > 0.0f ? 1.0f / totals[r] : 0.0f;
                const Index place = token[r] * q_heads + head[r];
                for (int d = 0; d < DV; ++d) store16(out + place * D + d * 16, sums[r][d] * inverse);
                if (lse) lse[place] = largest[r] + std::log(totals[r]);
            }
        }
    }

    // f(j, row) for first <= j < end, a page at a time. The rows of `head_dim` values needed about
    // sixteen keys later are prefetched: the hardware cannot predict addresses from a page table.
    template <class T, class F>
    void for_keys(const std::int32_t *pages, Index first, Index end, const T *pool, Index step,
                  Index head_dim, F f) const {
        if (first >= end) return;
        const Index last = (end - 1) / page_size, ahead = std::max<Index>(16 / page_size, 1);
        constexpr Index line = 64 / sizeof(T);
        for (Index page = first / page_size; page <= last; ++page) {
            const Index from = std::max(page * page_size, first);
            const Index stop = std::min((page + 1) * page_size, end);
            const Index skip = (from - page * page_size) * step;
            const T *row = pool + Index(pages[page]) * page_size * step + skip;
            const T *next = pool + Index(pages[std::min(page + ahead, last)]) * page_size * step + skip;
            for (Index j = from; j < stop; ++j, row += step, next += step) {
                for (Index i = 0; i < head_dim; i += line) prefetch(next, i);
                f(j, row);
            }
        }
    }

    // x[i] becomes e^(x[i] - largest) for lo <= i < hi and 0 elsewhere in [0, padded).
    void softmax(float *x, Index count, Index padded, Index lo, Index hi, float &total,
                 float &largest) const {
        const float none = -std::numeric_limits<float>::infinity();
        if (softcap != 0.0f)
            for (Index i = 0; i < count; ++i) x[i] = softcap * std::tanh(x[i] / softcap);
        hi = std::max(lo, std::min(hi, count));
        std::fill(x, x + std::min(lo, padded), none);
        std::fill(x + hi, x + padded, none);
        f32x16 highest = splat(none);
        for (Index i = 0; i < padded; i += 16) highest = larger(highest, load16(x + i));
        largest = none;
        for (int lane = 0; lane < 16; ++lane) largest = std::max(largest, highest[lane]);
        f32x16 sums = {};
        for (Index i = 0; i < padded; i += 16) {
            const f32x16 e = largest == none ? f32x16{} : exp16(load16(x + i) - largest);
            store16(x + i, e);
            sums += e;
        }
        total = sum(sums);
    }
};

template <class T, int DV>
void run_decode(const Decode &decode, const T *q, const T *k_pool, const T *v_pool, T *out,
                float *lse, Index sequences, int threads) {
    Index keys = 0;
    for (Index s = 0; s < sequences; ++s) keys += decode.lengths[s];
    if (keys * decode.q_heads * DV < WORTH_SHARING) threads = 1;
    share_blocks(sequences * decode.kv_heads, threads, [&](Blocks &blocks) {
        std::vector<float> scores;
        for (Index i; blocks.next(i);)
            decode.template item<T, DV>(i / decode.kv_heads, i % decode.kv_heads, q, k_pool, v_pool,
                                        out, lse, scores);
    });
}

}  // namespace

void decode(Address q, Index q_stride, Address k_pool, Address v_pool, Address page_table,
            Index table_stride, Address rows, Address lengths, Address out, Address lse,
            Index sequences, Index width, Index q_heads, Index kv_heads, Index head_dim,
            Index page_size, float scale, Index window, float softcap, bool is_bf16,
            int threads) {
    const Decode op{at<const std::int32_t>(page_table),
                    at<const std::int32_t>(rows),
                    at<const std::int32_t>(lengths),
                    table_stride,
                    q_stride,
                    width,
                    q_heads,
                    kv_heads,
                    page_size,
                    scale,
                    softcap,
                    window};
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        with_head_dim(head_dim, [&](auto dim) {
            run_decode<T, decltype(dim)::value / 16>(op, at<const T>(q), at<const T>(k_pool),
                                                     at<const T>(v_pool), at<T>(out),
                                                     at<float>(lse), sequences, threads);
        });
    });
}
