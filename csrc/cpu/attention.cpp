// Attention of chunks of queries over paged bf16 keys and values: scores and weighted sums as products
// of pairs, softmax in fp32, probabilities rounded to bf16 where pairs of that are multiplied.
//
// An item is a span of one sequence's queries with one key head. For each block of KEYS keys it puts
// them into the order of the products, then takes its queries a few rows at a time: a row is one
// query of one head. Blocks begin at multiples of KEYS, and a key that a row does not see adds zero, so
// a row's bits depend on its own keys alone, not on the chunk that it came in.

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "model_ops.h"
#include "pairs.h"
#include "pool.h"
#include "softmax.h"

namespace {

constexpr Index KEYS = 256;            // of a block
constexpr Index STEP = TILE_VECTORS * 16;  // keys that are multiplied at once
constexpr Index ROWS = 2 * TILE_ROWS;  // whose scores lie in the first cache
constexpr Index SPAN = 512;            // rows of an item, about: their sums lie in the second cache

struct Chunks {
    const std::int32_t *page_table, *rows, *lengths, *offsets;
    Index table_stride, q_stride, q_heads, kv_heads, page_size;
    float scale, softcap;  // softcap 0: none
    Index window;          // 0: none
};

struct Item {
    Index sequence, kv_head, begin, end;  // queries [begin, end) of the sequence
};

// What a thread works in; all that an item leaves of it is overwritten by the next.
template <int D>
struct Scratch {
    std::vector<bf16> keys, values;
    std::vector<Operand> queries, probabilities;
    std::vector<float> scores, sums, largest, totals, fix;

    explicit Scratch(Index rows)
        : keys(KEYS * D), values(KEYS * D), queries(rows * D), probabilities(ROWS * KEYS),
          scores(ROWS * KEYS), sums(rows * D), largest(rows), totals(rows), fix(ROWS) {}
};

// Sixteen keys side by side in pairs of dimensions, [KEYS / 16, D / 2, 16, 2], and pairs of values
// side by side, [KEYS / 2, D, 2], of the keys [first, first + count); what is missing is zero.
template <int D>
void pack(const Chunks &op, const std::int32_t *pages, const bf16 *k_pool, const bf16 *v_pool,
          Index kv_head, Index first, Index count, Scratch<D> &scratch) {
    alignas(64) static const bf16 zeros[D] = {};
    const bf16 *from_keys[KEYS], *from_values[KEYS];
    const Index padded = (count + STEP - 1) / STEP * STEP;
    Index page = first / op.page_size, within = first % op.page_size;
    for (Index j = 0; j < padded; ++j) {
        if (j >= count) {
            from_keys[j] = from_values[j] = zeros;
            continue;
        }
        const Index slot = Index(pages[page]) * op.page_size + within;
        from_keys[j] = k_pool + (slot * op.kv_heads + kv_head) * D;
        from_values[j] = v_pool + (slot * op.kv_heads + kv_head) * D;
        if (++within == op.page_size) ++page, within = 0;
    }
    for (Index j = 0; j < padded; j += 16)
        for (Index d = 0; d < D; d += 2) {
            std::uint32_t both[16];
            for (int i = 0; i < 16; ++i) both[i] = load_as<std::uint32_t>(from_keys[j + i] + d);
            std::memcpy(scratch.keys.data() + j * D + d * 16, both, sizeof both);
        }
    for (Index j = 0; j < padded; j += 2)
        for (Index d = 0; d < D; d += 16) {
            const u32x16 both = interleaved(from_values[j] + d, from_values[j + 1] + d);
            store_as(scratch.values.data() + j * D + d * 2, both);
        }
}

// scores[r][j] = q_r . k_j for TILE_ROWS rows and VECTORS blocks of sixteen keys.
template <int D, int VECTORS>
void multiply_keys(const Operand *queries, const bf16 *keys, float *scores) {
    f32x16 sums[TILE_ROWS][VECTORS] = {};
    for (int d = 0; d < D; d += 2) {
        Pairs columns[VECTORS];
        for (int v = 0; v < VECTORS; ++v) columns[v] = load_pairs(keys + v * 16 * D + d * 16);
        for (int r = 0; r < TILE_ROWS; ++r) {
            const auto own = broadcast_pair(queries + r * D + d);
            for (int v = 0; v < VECTORS; ++v) add_products(sums[r][v], own, columns[v]);
        }
    }
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store16(scores + r * KEYS + v * 16, sums[r][v]);
}

// sums[r] = fix[r] * sums[r] + sum_j p_rj v_j for TILE_ROWS rows, keys from <= j < upto, and
// dimensions [FIRST, D).
template <int D, int FIRST = 0>
void add_values(const Operand *probabilities, const bf16 *values, Index from, Index upto,
                const float *fix, float *sums) {
    constexpr int VECTORS = std::min((D - FIRST) / 16, TILE_VECTORS);
    f32x16 own[TILE_ROWS][VECTORS];
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
            own[r][v] = load16(sums + r * D + FIRST + v * 16) * fix[r];
    for (Index j = from; j < upto; j += 2) {
        Pairs columns[VECTORS];
        for (int v = 0; v < VECTORS; ++v)
            columns[v] = load_pairs(values + j * D + (FIRST + v * 16) * 2);
        for (int r = 0; r < TILE_ROWS; ++r) {
            const auto p = broadcast_pair(probabilities + r * KEYS + j);
            for (int v = 0; v < VECTORS; ++v) add_products(own[r][v], p, columns[v]);
        }
    }
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
            store16(sums + r * D + FIRST + v * 16, own[r][v]);
    if constexpr (FIRST + VECTORS * 16 < D)
        add_values<D, FIRST + VECTORS * 16>(probabilities, values, from, upto, fix, sums);
}

template <int D>
void run_item(const Chunks &op, const Item &item, const bf16 *q, const bf16 *k_pool,
              const bf16 *v_pool, bf16 *out, float *lse, Scratch<D> &scratch) {
    const Index groups = op.q_heads / op.kv_heads, first_token = op.offsets[item.sequence];
    const Index length = op.lengths[item.sequence];
    const Index past = length - (op.offsets[item.sequence + 1] - first_token);
    const Index num_rows = (item.end - item.begin) * groups;
    const Index padded_rows = (num_rows + ROWS - 1) / ROWS * ROWS;
    const auto place = [&](Index row) {  // of a row in q and out: token, head
        return std::pair(first_token + item.begin + row / groups, item.kv_head * groups + row % groups);
    };
    const auto position = [&](Index row) { return past + item.begin + row / groups; };
    for (Index row = 0; row < padded_rows; ++row) {
        Operand *to = scratch.queries.data() + row * D;
        if (row < num_rows) {
            const auto [token, head] = place(row);
            const bf16 *from = q + token * op.q_stride + head * D;
            for (int d = 0; d < D; d += 16) store16(to + d, load16(from + d));
        } else {
            std::fill_n(to, D, Operand{});
        }
    }
    std::fill_n(scratch.sums.begin(), padded_rows * D, 0.0f);
    std::fill_n(scratch.largest.begin(), padded_rows, NONE);
    std::fill_n(scratch.totals.begin(), padded_rows, 0.0f);
    const std::int32_t *pages = op.page_table + op.rows[item.sequence] * op.table_stride;
    const Index end = std::min(past + item.end, length);
    Index first = op.window ? std::max<Index>(past + item.begin - op.window + 1, 0) : 0;
    for (first = first / KEYS * KEYS; first < end; first += KEYS) {
        const Index count = std::min(KEYS, end - first);
        pack<D>(op, pages, k_pool, v_pool, item.kv_head, first, count, scratch);
        for (Index row = 0; row < padded_rows; row += ROWS) {
            const Index have = std::min(ROWS, num_rows - row);
            if (position(row + have - 1) < first) continue;  // before the block
            if (op.window && position(row) - op.window + 1 >= first + count) continue;  // after it
            // Of the block, steps with keys that a row here sees: all others would add zero.
            const Index seen = std::min(position(row + have - 1) + 1 - first, count);
            const Index upto = (seen + STEP - 1) / STEP * STEP;
            const Index from =
                op.window ? std::max<Index>(position(row) - op.window + 1 - first, 0) / STEP * STEP : 0;
            for (Index r = 0; r < ROWS; r += TILE_ROWS)
                for (Index j = from; j < upto; j += STEP)
                    multiply_keys<D, TILE_VECTORS>(scratch.queries.data() + (row + r) * D,
                                                   scratch.keys.data() + j * D,
                                                   scratch.scores.data() + r * KEYS + j);
            for (Index r = 0; r < ROWS; ++r) {
                const Index own = position(row + std::min(r, have - 1));
                const Index lo = op.window ? std::max<Index>(own - op.window + 1 - first, 0) : 0;
                const Index hi = std::clamp<Index>(own + 1 - first, 0, count);
                scratch.fix[r] =
                    softmax(op.scale, op.softcap, scratch.scores.data() + r * KEYS, lo, hi, from, upto,
                            scratch.largest[row + r], scratch.totals[row + r],
                            scratch.probabilities.data() + r * KEYS);
            }
            for (Index r = 0; r < ROWS; r += TILE_ROWS)
                add_values<D>(scratch.probabilities.data() + r * KEYS, scratch.values.data(), from,
                              upto, scratch.fix.data() + r, scratch.sums.data() + (row + r) * D);
        }
    }
    for (Index row = 0; row < num_rows; ++row) {
        const auto [token, head] = place(row);
        const float total = scratch.totals[row], inverse = total > 0.0f ? 1.0f / total : 0.0f;
        bf16 *to = out + (token * op.q_heads + head) * D;
        for (Index d = 0; d < D; d += 16)
            store16(to + d, load16(scratch.sums.data() + row * D + d) * inverse);
        if (lse) lse[token * op.q_heads + head] = scratch.largest[row] + std::log(total);
    }
}

template <int D>
void run_chunks(const Chunks &op, Index sequences, const bf16 *q, const bf16 *k_pool,
                const bf16 *v_pool, bf16 *out, float *lse, int threads) {
    const Index groups = op.q_heads / op.kv_heads, span = std::max<Index>(SPAN / groups, 1);
    std::vector<Item> items;
    for (Index s = 0; s < sequences; ++s) {
        const Index count = op.offsets[s + 1] - op.offsets[s];
        if (count == 0) continue;
        for (Index begin = (count - 1) / span * span; begin >= 0; begin -= span)  // the longest first
            for (Index head = 0; head < op.kv_heads; ++head)
                items.push_back({s, head, begin, std::min(begin + span, count)});
    }
    const Index most = (span * groups + ROWS - 1) / ROWS * ROWS;
    share_blocks(Index(items.size()), threads, [&](Blocks &blocks) {
        Scratch<D> scratch(most);
        for (Index i; blocks.next(i);)
            run_item<D>(op, items[i], q, k_pool, v_pool, out, lse, scratch);
    });
}

}  // namespace

void attention(Address q, Index q_stride, Address k_pool, Address v_pool, Address page_table,
               Index table_stride, Address rows, Address lengths, Address offsets, Address out,
               Address lse, Index sequences, Index q_heads, Index kv_heads, Index head_dim,
               Index page_size, float scale, Index window, float softcap, int threads) {
    const Chunks op{at<const std::int32_t>(page_table),
                    at<const std::int32_t>(rows),
                    at<const std::int32_t>(lengths),
                    at<const std::int32_t>(offsets),
                    table_stride,
                    q_stride,
                    q_heads,
                    kv_heads,
                    page_size,
                    scale,
                    softcap,
                    window};
    with_head_dim(head_dim, [&](auto dim) {
        run_chunks<decltype(dim)::value>(op, sequences, at<const bf16>(q), at<const bf16>(k_pool),
                                         at<const bf16>(v_pool), at<bf16>(out), at<float>(lse),
                                         threads);
    });
}
