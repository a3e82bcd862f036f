// Decode attention over paged keys and values: in bf16 by products of pairs, with softmax in fp32 and
// probabilities rounded to bf16; in fp32 throughout.
//
// An item is some rows of one sequence and some key heads, a row being one query of one head. Its rows
// share each read of a key or value, and keys of all its heads are read as they lie in memory.
// Keys are taken in blocks that begin at multiples of KEYS. A block gives each row a state (the
// largest score, the sum of probabilities, the weighted sum of values), and states are added in the
// order of the blocks. So a row's bits depend on its own keys alone: not on the rows beside it, nor on
// whether one thread takes all blocks of an item or several do.
// Cascade: the whole blocks that a group of sequences begins with are items of the rows of all of
// them; each sequence goes on from the states these leave. That too changes no bit.

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "decode_tiles.h"
#include "model_ops.h"
#include "pool.h"
#include "softmax.h"

namespace {

constexpr Index ROWS = 32;              // of an item
constexpr Index WORTH_SHARING = 20000;  // vectors of keys: waking a thread for fewer costs more

// The keys [begin, end) of one sequence, or those that several begin with.
struct Span {
    Index sequence, count;   // the first of the sequences
    Index past, begin, end;  // position of the first query
};

struct Item {
    Index sequence, kv_head, heads;  // of the keys
    Index query, count;              // rows [query, query + count) of each head, from `sequence` on
    Index past, begin, end;          // position of the first query; keys that a row may see

    Index num_rows() const { return heads * count; }
    Index num_keys() const { return std::max<Index>(end - begin, 0); }
    Index num_blocks() const { return (num_keys() + KEYS - 1) / KEYS; }
};

template <class T, int D>
struct Decode {
    const T *q, *k_pool, *v_pool;
    T *out;
    float *lse;
    const std::int32_t *page_table, *rows, *lengths;
    const std::int32_t *groups, *shared;  // null where nothing is shared
    Index num_groups, table_stride, q_stride, width, q_heads, kv_heads, page_size;
    float scale, softcap;  // softcap 0: none
    Index window;          // 0: none; then nothing is shared

    Index per_key() const { return q_heads / kv_heads; }

    Index position(const Item &item, Index row) const {
        return item.past + (item.query + row % item.count) / per_key();
    }

    // Where a row of the item lies in q and out: token, head.
    std::pair<Index, Index> place(const Item &item, Index row) const {
        const Index own = item.query + row % item.count, head = item.kv_head + row / item.count;
        return {item.sequence * width + own / per_key(), head * per_key() + own % per_key()};
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

    // The states of all rows after the keys that are shared.
    void save(const Item &item, const States<D> &states, const States<D> &all) const {
        for (Index row = 0; row < item.num_rows(); ++row) {
            const auto [token, head] = place(item, row);
            std::copy_n(states.sums(row), States<D>::STRIDE, all.sums(token * q_heads + head));
        }
    }

    bool resumes(const Item &item) const { return shared && item.begin > 0; }

    // The states before an item's keys.
    void begin(const Item &item, const States<D> &states, const States<D> &all) const {
        if (!resumes(item)) return states.clear(item.num_rows());
        for (Index row = 0; row < item.num_rows(); ++row) {
            const auto [token, head] = place(item, row);
            std::copy_n(all.sums(token * q_heads + head), States<D>::STRIDE, states.sums(row));
        }
    }

    void run(Index sequences, int threads) const {
        const auto of_group = [&](Index g) {
            const std::int32_t *group = groups + 3 * g;  // first, count, pages
            const Index end = group[2] * page_size / KEYS * KEYS;
            return Span{group[0], group[1], end, 0, end};
        };
        const auto of_sequence = [&](Index s) {
            const Index begin = shared ? shared[s] / KEYS * KEYS : 0;
            return Span{s, 1, lengths[s] - width, begin, lengths[s]};
        };
        const std::vector<Item> common = items(num_groups, threads, of_group);
        const Index kept = common.empty() ? 0 : sequences * width * q_heads * States<D>::STRIDE;
        const auto memory = std::make_unique_for_overwrite<float[]>(kept);
        const States<D> all{memory.get()};
        take(common, threads, all, [&](const Item &item, const States<D> &states) {
            save(item, states, all);
        });
        take(items(sequences, threads, of_sequence), threads, all,
             [&](const Item &item, const States<D> &states) { finish(item, states); });
    }

    // The items of spans, so many that threads end at about the same time.
    template <class F>
    std::vector<Item> items(Index spans, int threads, const F &span_of) const {
        std::vector<Item> found;
        for (Index most = kv_heads;;) {  // key heads of an item
            Index blocks = 0, widest = 1;
            found.clear();
            for (Index i = 0; i < spans; ++i) {
                const Span span = span_of(i);
                const Index all = span.count * per_key() * width;
                const Index rows_of_head = std::clamp<Index>(all, 1, ROWS);
                const Index heads = std::min(ROWS / rows_of_head, most);
                widest = std::max(widest, heads);
                for (Index head = 0; head < kv_heads; head += heads)
                    for (Index query = 0; query < all; query += rows_of_head) {
                        found.push_back(item(span, head, heads, query, rows_of_head));
                        blocks += found.back().num_blocks();
                    }
            }
            if (threads == 1 || widest == 1 || blocks >= 4 * threads) return found;
            most = std::max<Index>(widest * blocks / (4 * threads), 1);
        }
    }

    Item item(const Span &span, Index head, Index heads, Index query, Index rows_of_head) const {
        Item item;
        item.sequence = span.sequence;
        item.kv_head = head;
        item.heads = std::min(heads, kv_heads - head);
        item.query = query;
        item.count = std::min(rows_of_head, span.count * per_key() * width - query);
        item.past = span.past;
        item.begin = span.begin;
        if (window) item.begin = std::max<Index>(position(item, 0) - window + 1, 0) / KEYS * KEYS;
        item.end = std::min(position(item, item.count - 1) + 1, span.end);
        return item;
    }

    // Gives the states behind each item's keys to `use`.
    template <class F>
    void take(const std::vector<Item> &items, int threads, const States<D> &all, const F &use) const {
        Index work = 0, most = 0, longest = 0;  // in keys of rows
        for (const Item &item : items) {
            work += item.num_keys() * item.num_rows();
            most = std::max(most, item.num_keys() * item.num_rows());
            longest = std::max(longest, item.num_keys());
        }
        if (work * (D / 16) < WORTH_SHARING) threads = 1;
        if (threads > 1 && longest > KEYS && most * 4 * threads > work)
            return take_split(items, threads, all, use);
        share_blocks(items.size(), threads, [&](Blocks &some) {
            alignas(64) float mine[ROWS * States<D>::STRIDE], one[ROWS * States<D>::STRIDE];
            const States<D> states{mine}, part{one};
            for (Index i; some.next(i);) {
                const Item &own = items[i];
                Index first = own.begin;
                if (resumes(own) || first >= own.end)
                    begin(own, states, all);
                else
                    block(own, std::exchange(first, first + KEYS), states);
                for (; first < own.end; first += KEYS) {
                    block(own, first, part);
                    states.add(part, own.num_rows());
                }
                use(own, states);
            }
        });
    }

    // Several threads take the blocks of an item, whose states are kept until all are there.
    template <class F>
    void take_split(const std::vector<Item> &items, int threads, const States<D> &all,
                    const F &use) const {
        std::vector<Index> parts(items.size() + 1);
        for (std::size_t i = 0; i < items.size(); ++i) parts[i + 1] = parts[i] + items[i].num_blocks();
        const Index size = ROWS * States<D>::STRIDE;
        const auto kept = std::make_unique_for_overwrite<float[]>(parts.back() * size);
        share(parts.back(), threads, [&](Index part) {
            const Index i = std::upper_bound(parts.begin(), parts.end(), part) - parts.begin() - 1;
            block(items[i], items[i].begin + (part - parts[i]) * KEYS, {kept.get() + part * size});
        });
        share(items.size(), threads, [&](Index i) {
            alignas(64) float mine[ROWS * States<D>::STRIDE];
            const States<D> states{mine};
            begin(items[i], states, all);
            for (Index part = parts[i]; part < parts[i + 1]; ++part)
                states.add({kept.get() + part * size}, items[i].num_rows());
            use(items[i], states);
        });
    }
};

}  // namespace

void decode(Address q, Index q_stride, Address k_pool, Address v_pool, Address page_table,
            Index table_stride, Address rows, Address lengths, Address groups, Address shared,
            Address out, Address lse, Index sequences, Index num_groups, Index width,
            Index q_heads, Index kv_heads, Index head_dim, Index page_size, float scale,
            Index window, float softcap, bool is_bf16, int threads) {
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
                                               at<const std::int32_t>(groups),
                                               at<const std::int32_t>(shared),
                                               num_groups,
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
