// A mixture of experts: which of them a token goes to, and their gated blocks with weights in panels.
//
// Pairs of a token and one of its experts are sorted by expert, so that each expert's weights are
// read once for all of its rows. Threads share out (expert, panels). The products of a pair depend on
// nothing else in the batch, and a token adds its experts up in the order of its choices.

#include <algorithm>
#include <limits>
#include <vector>

#include "gate.h"
#include "panels.h"
#include "pool.h"

namespace {

constexpr Index WORTH_SHARING = 500000;  // products: waking a thread for fewer costs more
constexpr int GATES = std::max(TILE_VECTORS / 2, 1);  // vectors of gates in a tile; as many of ups
constexpr int ROWS = std::min(TILE_ROWS * TILE_VECTORS / (2 * GATES), TILE_ROWS);  // beside them

// Of an array of n columns, what lies from `column` on.
void put(f32x16 values, bf16 *row, Index column, Index n) {
    if (column + 16 <= n) {
        store16(row + column, values);
        return;
    }
    for (Index c = column; c < n; ++c) store(row + c, values[c - column]);
}

struct Experts {
    const bf16 *x;        // [tokens, hidden]
    const bf16 *gate_up;  // panels [experts, 2, inner / 32, hidden / 2, 32, 2]: of gates, of ups
    const bf16 *down;     // panels [experts, hidden / 32, inner / 2, 32, 2]
    const float *weights;     // [tokens, top_k]
    const std::int32_t *ids;  // [tokens, top_k]
    bf16 *middle;             // [pairs, inner], by expert
    bf16 *parts;              // [pairs, hidden], by token
    bf16 *out;                // [tokens, hidden]
    Index tokens, experts, top_k, hidden, inner, x_stride;
    bool gelu;
    std::vector<std::int32_t> order{};  // pairs, by expert
    std::vector<Index> chosen{};        // experts with pairs
    std::vector<Index> begins{};        // of each of them in `order`, and the end

    bool is_own(std::int32_t id) const { return id >= 0 && id < experts; }

    void sort() {
        std::vector<Index> next(experts + 1);  // first the counts of those before
        for (Index pair = 0; pair < tokens * top_k; ++pair)
            if (is_own(ids[pair])) ++next[ids[pair] + 1];
        for (Index e = 0; e < experts; ++e) {
            if (next[e + 1]) {
                chosen.push_back(e);
                begins.push_back(next[e]);
            }
            next[e + 1] += next[e];
        }
        begins.push_back(next[experts]);
        order.resize(next[experts]);
        for (Index pair = 0; pair < tokens * top_k; ++pair)
            if (is_own(ids[pair])) order[next[ids[pair]]++] = std::int32_t(pair);
    }

    // act(gate) * up in sixteen times GATES columns, for all rows of the c-th chosen expert.
    void first_product(Index c, Index column) const {
        const Index panels = (inner + WIDTH - 1) / WIDTH * WIDTH * hidden;  // of gates, or of ups
        const bf16 *from = gate_up + chosen[c] * 2 * panels + column / WIDTH * WIDTH * hidden;
        const bf16 *w[2 * GATES];
        for (int v = 0; v < GATES; ++v) {
            w[v] = from + (column % WIDTH + v * 16) * 2;
            w[GATES + v] = w[v] + panels;
        }
        for_tiles<ROWS>(begins[c + 1] - begins[c], [&](Index row, auto height) {
            constexpr int MT = decltype(height)::value;
            const Index first = begins[c] + row;
            const bf16 *rows[MT];
            for (int t = 0; t < MT; ++t) rows[t] = x + order[first + t] / top_k * x_stride;
            f32x16 sums[MT][2 * GATES] = {};
            add_tile(rows, w, hidden, sums);
            for (int v = 0; v < GATES; ++v)
                for (int t = 0; t < MT; ++t) {
                    const f32x16 gates = gelu ? gate<true>(sums[t][v]) : gate<false>(sums[t][v]);
                    put(gates * sums[t][GATES + v], middle + (first + t) * inner, column + v * 16,
                        inner);
                }
        });
    }

    // One panel's columns of an expert's results, for all its rows.
    void second_product(Index c, Index panel) const {
        const Index panels = (hidden + WIDTH - 1) / WIDTH;
        const bf16 *from = down + (chosen[c] * panels + panel) * WIDTH * inner;
        const bf16 *w[2] = {from, from + WIDTH};
        for_tiles<ROWS>(begins[c + 1] - begins[c], [&](Index row, auto height) {
            constexpr int MT = decltype(height)::value;
            const Index first = begins[c] + row;
            const bf16 *rows[MT];
            for (int t = 0; t < MT; ++t) rows[t] = middle + (first + t) * inner;
            f32x16 sums[MT][2] = {};
            add_tile(rows, w, inner, sums);
            for (int v = 0; v < 2; ++v)
                for (int t = 0; t < MT; ++t)
                    put(sums[t][v], parts + order[first + t] * hidden, panel * WIDTH + v * 16, hidden);
        });
    }

    void add_up(Index token) const {
        const std::int32_t *id = ids + token * top_k;
        const float *weight = weights + token * top_k;
        const bf16 *from = parts + token * top_k * hidden;
        Index h = 0;
        for (; h + 16 <= hidden; h += 16) {
            f32x16 total = {};
            for (Index j = 0; j < top_k; ++j)
                if (is_own(id[j])) total += load16(from + j * hidden + h) * weight[j];
            store16(out + token * hidden + h, total);
        }
        for (; h < hidden; ++h) {
            float total = 0.0f;
            for (Index j = 0; j < top_k; ++j)
                if (is_own(id[j])) total += to_float(from[j * hidden + h]) * weight[j];
            store(out + token * hidden + h, total);
        }
    }

    void run(int threads) {
        sort();
        if (Index(order.size()) * hidden * inner < WORTH_SHARING / 3) threads = 1;
        const auto count = Index(chosen.size());
        const Index firsts = (inner + WIDTH - 1) / WIDTH, seconds = (hidden + WIDTH - 1) / WIDTH;
        share(count * firsts, threads, [&](Index block) {
            const Index column = block % firsts * WIDTH;
            for (Index c = column; c < column + WIDTH; c += 16 * GATES)
                first_product(block / firsts, c);
        });
        const Index pairs_of = (seconds + 1) / 2;  // two panels at a time
        share(count * pairs_of, threads, [&](Index block) {
            const Index panel = block % pairs_of * 2;
            for (Index p = panel; p < std::min(panel + 2, seconds); ++p)
                second_product(block / pairs_of, p);
        });
        share_rows(tokens, threads, [&](Index token) { add_up(token); });
    }
};

template <class T>
void route(const T *x, float *weights, std::int32_t *ids, Index experts, Index top_k,
           bool renormalize) {
    static thread_local std::vector<float> p;
    p.assign((experts + 15) / 16 * 16, -std::numeric_limits<float>::infinity());
    for (Index e = 0; e < experts; ++e) p[e] = to_float(x[e]);
    const float most = *std::max_element(p.begin(), p.begin() + experts);
    f32x16 sums = {};
    for (std::size_t e = 0; e < p.size(); e += 16) {
        const f32x16 powers = exp16(load16(&p[e]) - most);
        sums += powers;
        store16(&p[e], powers);
    }
    const float all = sum(sums);
    float total = 0.0f;
    for (Index j = 0; j < top_k; ++j) {
        const auto best = std::max_element(p.begin(), p.begin() + experts);  // the first of equals
        ids[j] = std::int32_t(best - p.begin());
        weights[j] = *best / all;
        total += weights[j];
        *best = -1.0f;
    }
    for (Index j = 0; renormalize && j < top_k; ++j) weights[j] /= total;
}

}  // namespace

void moe_route(Address logits, Index stride, Address weights, Address ids, Index tokens,
               Index experts, Index top_k, bool renormalize, bool is_bf16, int threads) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        share_rows(tokens, tokens * experts < 1 << 12 ? 1 : threads, [&](Index token) {
            route(at<const T>(logits) + token * stride, at<float>(weights) + token * top_k,
                  at<std::int32_t>(ids) + token * top_k, experts, top_k, renormalize);
        });
    });
}

void moe_experts(Address x, Index x_stride, Address gate_up, Address down, Address weights,
                 Address ids, Address middle, Address parts, Address out, Index tokens,
                 Index experts, Index top_k, Index hidden, Index inner, bool gelu, int threads) {
    Experts{at<const bf16>(x), at<const bf16>(gate_up), at<const bf16>(down),
            at<const float>(weights), at<const std::int32_t>(ids), at<bf16>(middle),
            at<bf16>(parts), at<bf16>(out), tokens, experts, top_k, hidden, inner, x_stride, gelu}
        .run(threads);
}
