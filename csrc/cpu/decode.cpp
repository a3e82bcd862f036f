// Decode attention over paged keys and values: in bf16 by products of pairs, with softmax in fp32 and
// probabilities rounded to bf16; in fp32 throughout.
//
// An item is some rows of one sequence and some key heads, a row being one query of one head. Its rows
// share each read of a key or value, and keys of all its heads are read as they lie in memory.
// Keys are taken in blocks that begin at multiples of KEYS. A block gives each row a state (the
// largest score, the sum of probabilities, the weighted sum of values), and states are added in the
// order of the blocks. So a row's bits depend on its own keys alone: not on the rows beside it, nor on
// whether one thread takes all blocks of an item or several do.

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "model_ops.h"
#include "pairs.h"
#include "pool.h"
#include "softmax.h"

namespace {

constexpr Index KEYS = 256;  // of a block
constexpr Index TILE = 16;   // keys at a time, and how far ahead they are prefetched
constexpr Index ROWS = 32;   // of an item
constexpr Index WORTH_SHARING = 20000;  // vectors of keys: waking a thread for fewer costs more

// Sums in registers, in vectors, and rows that share a read of them.
#if defined(__AVX512F__)
constexpr int HELD = 16, MOST_ROWS = 4;
#else
constexpr int HELD = 4, MOST_ROWS = 2;
#endif

// What is needed a tile later: the hardware cannot predict addresses from a page table. It is asked for
// in between, key by key, for a burst of requests would wait for each other.
template <class T, int D>
struct Later {
    const T *pool = nullptr;
    const Index *offsets = nullptr;

    void fetch(Index j) const {
        if (pool)
            for (Index d = 0; d < D; d += 64 / sizeof(T)) prefetch(pool, offsets[j] + d);
    }
};

// scores[r][j] = q_r . k_j for R rows and TILE keys.
template <class T, int D, int R>
void multiply_keys(const T *queries, const T *keys, const Index *offsets, const Later<T, D> &later,
                   float *scores) {
    f32x16 folded[R][4];
    for (int i = 0; i < 4; ++i) {
        f32x16 sums[R][4] = {};
        const T *own[4];
        for (int c = 0; c < 4; ++c) own[c] = keys + offsets[i + 4 * c];
        for (int c = 0; c < 4; ++c) later.fetch(4 * i + c);
        const auto add = [&](int d, auto load) {
            decltype(load(queries)) parts[4];
            for (int c = 0; c < 4; ++c) parts[c] = load(own[c] + d);
            for (int r = 0; r < R; ++r) {
                const auto query = load(queries + r * D + d);
                for (int c = 0; c < 4; ++c) add_products(sums[r][c], query, parts[c]);
            }
        };
        for (int d = 0; d + 32 <= D; d += 32) add(d, [](const T *p) { return load_pairs(p); });
        if constexpr (D % 32) add(D - 16, [](const T *p) { return load_half(p); });
#if defined(__AVX512F__)
        for (int r = 0; r < R; ++r) folded[r][i] = fold4(sums[r]);
    }
    for (int r = 0; r < R; ++r) store16(scores + r * KEYS, sum16(folded[r]));
#else
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 4; ++c) scores[r * KEYS + i + 4 * c] = sum(sums[r][c]);
    }
#endif
}

// sums[r] += sum_j p_rj v_j for R rows, TILE keys and dimensions [FIRST, D); rows of sums lie `stride`
// apart.
template <class T, int D, int R, int FIRST = 0>
void add_values(const T *probabilities, const T *values, const Index *offsets,
                const Later<T, D> &later, float *sums, Index stride) {
    constexpr int VECTORS = std::min((D - FIRST) / 16, HELD / R);
    f32x16 own[R][VECTORS];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) own[r][v] = load16(sums + r * stride + FIRST + v * 16);
    for (Index j = 0; j < TILE; j += 2) {
        const T *a = values + offsets[j] + FIRST, *b = values + offsets[j + 1] + FIRST;
        if (FIRST == 0) later.fetch(j), later.fetch(j + 1);
        decltype(broadcast_pair(a)) p[R];
        for (int r = 0; r < R; ++r) p[r] = broadcast_pair(probabilities + r * KEYS + j);
        for (int v = 0; v < VECTORS; ++v) {
            const auto both = load_rows(a + v * 16, b + v * 16);
            for (int r = 0; r < R; ++r) add_products(own[r][v], p[r], both);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) store16(sums + r * stride + FIRST + v * 16, own[r][v]);
    if constexpr (FIRST + VECTORS * 16 < D)
        add_values<T, D, R, FIRST + VECTORS * 16>(probabilities, values, offsets, later, sums, stride);
}

// f(row, count) for all rows, as many at a time as share a read.
template <int COUNT = MOST_ROWS, class F>
void in_tiles(Index row, Index end, const F &f) {
    for (; row + COUNT <= end; row += COUNT) f(row, std::integral_constant<int, COUNT>{});
    if constexpr (COUNT > 1) in_tiles<COUNT / 2>(row, end, f);
}

// States of rows: each D floats of sums, the largest score, the sum of probabilities.
template <int D>
struct States {
    static constexpr Index STRIDE = D + 16;  // whole lines of the cache

    float *data;

    float *sums(Index row) const { return data + row * STRIDE; }
    float &largest(Index row) const { return data[row * STRIDE + D]; }
    float &total(Index row) const { return data[row * STRIDE + D + 1]; }

    void clear(Index rows) const {
        std::fill_n(data, rows * STRIDE, 0.0f);
        for (Index row = 0; row < rows; ++row) largest(row) = NONE;
    }

    // Adds the states of later keys. One without keys changes no bit of the other.
    void add(const States &later, Index rows) const {
        for (Index row = 0; row < rows; ++row) {
            if (later.largest(row) == NONE) continue;
            if (largest(row) == NONE) {
                std::copy_n(later.sums(row), STRIDE, sums(row));
                continue;
            }
            const float highest = std::max(largest(row), later.largest(row));
            const float fix = std::exp(largest(row) - highest);
            const float own = std::exp(later.largest(row) - highest);
            for (Index d = 0; d < D; d += 16) {
                const f32x16 more = load16(later.sums(row) + d) * own;
                store16(sums(row) + d, load16(sums(row) + d) * fix + more);
            }
            total(row) = total(row) * fix + later.total(row) * own;
            largest(row) = highest;
        }
    }
};

struct Item {
    Index sequence, kv_head, heads;  // of the keys
    Index query, count;              // rows [query, query + count) of each head
    Index past, begin, end;          // position of the first query; keys that a row may see

    Index num_rows() const { return heads * count; }
};

template <class T, int D>
struct Decode {
    const T *q, *k_pool, *v_pool;
    T *out;
    float *lse;
    const std::int32_t *page_table, *rows, *lengths;
    Index table_stride, q_stride, width, q_heads, kv_heads, page_size;
    float scale, softcap;  // softcap 0: none
    Index window;          // 0: none
    Index heads_of_item = 0, rows_of_head = 0;  // of an item, at most: `run` decides

    Index groups() const { return q_heads / kv_heads; }
    Index parts_of_heads() const { return (kv_heads + heads_of_item - 1) / heads_of_item; }
    Index parts_of_rows() const { return (groups() * width + rows_of_head - 1) / rows_of_head; }
    Index items_of_sequence() const { return parts_of_heads() * parts_of_rows(); }

    Item item(Index i) const {
        Item item;
        item.sequence = i / items_of_sequence();
        item.kv_head = i % items_of_sequence() / parts_of_rows() * heads_of_item;
        item.heads = std::min(heads_of_item, kv_heads - item.kv_head);
        item.query = i % parts_of_rows() * rows_of_head;
        item.count = std::min(rows_of_head, groups() * width - item.query);
        const Index length = lengths[item.sequence];
        item.past = length - width;
        item.begin = window ? std::max<Index>(position(item, 0) - window + 1, 0) / KEYS * KEYS : 0;
        item.end = std::min(position(item, item.count - 1) + 1, length);
        return item;
    }

    Index position(const Item &item, Index row) const {
        return item.past + (item.query + row % item.count) / groups();
    }

    // Where a row of the item lies in q and out: token, head.
    std::pair<Index, Index> place(const Item &item, Index row) const {
        const Index own = item.query + row % item.count, head = item.kv_head + row / item.count;
        return {item.sequence * width + own / groups(), head * groups() + own % groups()};
    }

    // The states of an item's rows over the keys [first, first + KEYS).
    void block(const Item &item, Index first, const States<D> &states) const {
        alignas(64) float scores[ROWS * KEYS];
        alignas(64) T probabilities[ROWS * KEYS];
        Index offsets[KEYS];
        const Index count = std::min(KEYS, item.end - first), padded = (count + TILE - 1) / TILE * TILE;
        const Index from =  // tiles before it are in no row's window
            window ? std::max<Index>(position(item, 0) - window + 1 - first, 0) / TILE * TILE : 0;
        locate(item, first, from, count, padded, offsets);
        score(item, offsets, from, padded, scores);
        states.clear(item.num_rows());
        for (Index row = 0; row < item.num_rows(); ++row) {
            const Index own = position(item, row);
            const Index lo = window ? std::max<Index>(own - window + 1 - first, 0) : 0;
            const Index hi = std::clamp<Index>(own + 1 - first, 0, count);
            softmax(scale, softcap, scores + row * KEYS, lo, hi, from, padded, states.largest(row),
                    states.total(row), probabilities + row * KEYS);
        }
        for (Index j = from; j < padded; j += TILE)
            for (Index h = 0; h < item.heads; ++h) {
                const T *values = v_pool + (item.kv_head + h) * D;
                Later<T, D> later;
                if (j + TILE < padded) later = {values, offsets + j + TILE};
                in_tiles(h * item.count, (h + 1) * item.count, [&](Index row, auto tile) {
                    add_values<T, D, decltype(tile)::value>(probabilities + row * KEYS + j, values,
                                                            offsets + j, std::exchange(later, {}),
                                                            states.sums(row), States<D>::STRIDE);
                });
            }
    }

    void score(const Item &item, const Index *offsets, Index from, Index padded, float *scores) const {
        alignas(64) T queries[ROWS * D];
        for (Index row = 0; row < item.num_rows(); ++row) {
            const auto [token, head] = place(item, row);
            std::copy_n(q + token * q_stride + head * D, D, queries + row * D);
        }
        for (Index j = from; j < padded; j += TILE)
            for (Index h = 0; h < item.heads; ++h) {
                const Index skip = (item.kv_head + h) * D;
                Later<T, D> later{v_pool + skip, offsets + from};
                if (j + TILE < padded) later = {k_pool + skip, offsets + j + TILE};
                in_tiles(h * item.count, (h + 1) * item.count, [&](Index row, auto tile) {
                    multiply_keys<T, D, decltype(tile)::value>(
                        queries + row * D, k_pool + skip, offsets + j, std::exchange(later, {}),
                        scores + row * KEYS + j);
                });
            }
    }

    // Where the keys [first + from, first + count) lie in the pools; then it is the last key again.
    void locate(const Item &item, Index first, Index from, Index count, Index padded,
                Index *offsets) const {
        const std::int32_t *pages = page_table + rows[item.sequence] * table_stride;
        const Index step = kv_heads * D;
        Index page = (first + from) / page_size, within = (first + from) % page_size;
        for (Index j = from; j < count; ++page, within = 0) {
            const Index stop = std::min(count, j + page_size - within);
            Index offset = (Index(pages[page]) * page_size + within) * step;
            for (; j < stop; ++j, offset += step) offsets[j] = offset;
        }
        std::fill(offsets + count, offsets + padded, offsets[count - 1]);
    }

    void finish(const Item &item, const States<D> &states) const {
        for (Index row = 0; row < item.num_rows(); ++row) {
            const auto [token, head] = place(item, row);
            const float total = states.total(row), inverse = total > 0.0f ? 1.0f / total : 0.0f;
            for (Index d = 0; d < D; d += 16)
                store16(out + (token * q_heads + head) * D + d, load16(states.sums(row) + d) * inverse);
            if (lse) lse[token * q_heads + head] = states.largest(row) + std::log(total);
        }
    }

    void run(Index sequences, int threads) {
        Index keys = 0, longest = 0, blocks = 0;
        for (Index s = 0; s < sequences; ++s) {
            const Index seen = window ? std::min<Index>(lengths[s], window + width) : Index(lengths[s]);
            keys += seen;
            blocks += (seen + KEYS - 1) / KEYS;
            longest = std::max(longest, seen);
        }
        if (keys * q_heads * (D / 16) < WORTH_SHARING) threads = 1;
        rows_of_head = std::min(groups() * width, ROWS);
        heads_of_item = std::min(ROWS / rows_of_head, kv_heads);
        const Index enough = 4 * threads;  // parts for the threads to end at about the same time
        if (threads > 1 && blocks * items_of_sequence() < enough)
            heads_of_item = std::max<Index>(heads_of_item * blocks * items_of_sequence() / enough, 1);
        if (threads > 1 && longest > KEYS && longest * enough > keys * items_of_sequence())
            return run_split(sequences * items_of_sequence(), threads);
        share_blocks(sequences * items_of_sequence(), threads, [&](Blocks &some) {
            alignas(64) float all[ROWS * States<D>::STRIDE], one[ROWS * States<D>::STRIDE];
            const States<D> states{all}, part{one};
            for (Index i; some.next(i);) {
                const Item own = item(i);
                Index first = own.begin;
                if (first < own.end)
                    block(own, first, states);
                else
                    states.clear(own.num_rows());
                while ((first += KEYS) < own.end) {
                    block(own, first, part);
                    states.add(part, own.num_rows());
                }
                finish(own, states);
            }
        });
    }

    // Several threads take the blocks of an item, whose states are kept until all are there.
    void run_split(Index items, int threads) const {
        std::vector<Index> parts(items + 1);
        for (Index i = 0; i < items; ++i) {
            const Item own = item(i);
            parts[i + 1] = parts[i] + std::max<Index>(own.end - own.begin + KEYS - 1, 0) / KEYS;
        }
        const Index size = heads_of_item * rows_of_head * States<D>::STRIDE;
        const auto kept = std::make_unique_for_overwrite<float[]>(parts[items] * size);
        share(parts[items], threads, [&](Index part) {
            const Index i = std::upper_bound(parts.begin(), parts.end(), part) - parts.begin() - 1;
            const Item own = item(i);
            block(own, own.begin + (part - parts[i]) * KEYS, {kept.get() + part * size});
        });
        share(items, threads, [&](Index i) {
            alignas(64) float all[ROWS * States<D>::STRIDE];
            const States<D> states{all};
            const Item own = item(i);
            states.clear(own.num_rows());
            for (Index part = parts[i]; part < parts[i + 1]; ++part)
                states.add({kept.get() + part * size}, own.num_rows());
            finish(own, states);
        });
    }
};

}  // namespace

void decode(Address q, Index q_stride, Address k_pool, Address v_pool, Address page_table,
            Index table_stride, Address rows, Address lengths, Address out, Address lse,
            Index sequences, Index width, Index q_heads, Index kv_heads, Index head_dim,
            Index page_size, float scale, Index window, float softcap, bool is_bf16,
            int threads) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        with_head_dim(head_dim, [&](auto dim) {
            Decode<T, decltype(dim)::value> op{at<const T>(q),
                                               at<const T>(k_pool),
                                               at<const T>(v_pool),
                                               at<T>(out),
                                               at<float>(lse),
                                               at<const std::int32_t>(page_table),
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
            op.run(sequences, threads);
        });
    });
}
