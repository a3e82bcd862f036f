// A mixture of experts: which of them a token goes to, and their gated blocks with weights in panels, of
// bf16 or in codes.
//
// Pairs of a token and one of its experts are sorted by expert, so that each expert's weights are
// read once for all of its rows. Threads share out (expert, panels). The products of a pair depend on
// nothing else in the batch, and a token adds its experts up in the order of its choices.

#include <algorithm>
#include <limits>
#include <vector>

#include "gate.h"
#include "grouped.h"
#include "pool.h"

namespace {

constexpr Index WORTH_SHARING = 500000;  // products: waking a thread for fewer costs more
constexpr int GATES = std::max(TILE_VECTORS / 2, 1);  // vectors of gates in a tile; as many of ups
constexpr int ROWS = std::min(TILE_ROWS * TILE_VECTORS / (2 * GATES), TILE_ROWS);  // beside them

// Of an array of n columns, what lies from `column` on.
template <class T>
void put(f32x16 values, T *row, Index column, Index n) {
    if (column + 16 <= n) {
        store16(row + column, values);
        return;
    }
    for (Index c = column; c < n; ++c) store(row + c, values[c - column]);
}

template <class T>
struct Experts {
    const T *x;                // [tokens, hidden]
    const float *weights;      // [tokens, top_k]
    const std::int32_t *ids;   // [tokens, top_k]
    T *middle;                 // [pairs, inner], by expert
    T *parts;                  // [pairs, hidden], by token
    T *out;                    // [tokens, hidden]
    Index tokens, experts, top_k, hidden, inner, x_stride;
    bool gelu;
    int threads;
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

    void put_gated(f32x16 gates, f32x16 ups, Index place, Index column) const {
        const f32x16 factors = gelu ? gate<true>(gates) : gate<false>(gates);
        put(factors * ups, middle + place * inner, column, inner);
    }

    // act(gate) * up in sixteen times GATES columns, for all rows of the c-th chosen expert. Panels
    // [experts, 2, inner / 32, hidden / 2, 32, 2]: of gates, of ups.
    void gated_columns(const bf16 *gate_up, Index c, Index column) const {
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
                for (int t = 0; t < MT; ++t)
                    put_gated(sums[t][v], sums[t][GATES + v], first + t, column + v * 16);
        });
    }

    void first_product(const bf16 *gate_up, const Rounded &) const {
        const Index panels = (inner + WIDTH - 1) / WIDTH;
        share(Index(chosen.size()) * panels, threads, [&](Index block) {
            const Index column = block % panels * WIDTH;
            for (Index c = column; c < column + WIDTH; c += 16 * GATES)
                gated_columns(gate_up, block / panels, c);
        });
    }

    // One panel's columns of an expert's results, for all its rows. Panels [hidden / 32, inner / 2, 32, 2].
    void result_columns(const bf16 *down, Index c, Index panel) const {
        const bf16 *from = down + panel * WIDTH * inner;
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

    void second_product(const bf16 *down, const Rounded &) const {
        const Index panels = (hidden + WIDTH - 1) / WIDTH, pairs_of = (panels + 1) / 2;
        share(Index(chosen.size()) * pairs_of, threads, [&](Index block) {  // two panels at a time
            const Index c = block / pairs_of, panel = block % pairs_of * 2;
            for (Index p = panel; p < std::min(panel + 2, panels); ++p)
                result_columns(down + chosen[c] * panels * WIDTH * inner, c, p);
        });
    }

    // Rounds what lies at row_of(place) for each place in `order`, in the tiles of its expert.
    template <class R>
    void round(const Rounded &to, const R &row_of) const {
        share(Index(chosen.size()), threads, [&](Index c) {
            const Index first = begins[c], m = begins[c + 1] - first;
            for (Index tile = 0; tile * ROUNDED_ROWS < m; ++tile)
                to.put_tile([&](Index row) { return row_of(first + row); }, first, m, tile);
        });
    }

    // put(sums [rows, 32], first place, rows) of one panel and all rows of the c-th chosen expert.
    template <class W, class R, class F>
    void coded_columns(const W &w, const Rounded &rounded, const R &row_of, Index c, Index panel,
                       const F &put) const {
        const Index first = begins[c], m = begins[c + 1] - first;
        const auto own = [&](const float *sums, Index row, Index rows) { put(sums, first + row, rows); };
        if (rounded.codes)
            rounded_panel(w, panel, rounded, first, m, own);
        else
            float_panel(w, panel, [&](Index row) { return row_of(first + row); }, m, own);
    }

    template <class W>
    void first_product(const W &w, const Rounded &rounded) const {
        const auto row_of = [&](Index place) { return x + order[place] / top_k * x_stride; };
        if (rounded.codes) round(rounded, row_of);
        share(Index(chosen.size()) * w.panels(), threads, [&](Index block) {
            static thread_local std::vector<float> gates;  // [rows, 32]
            const Index c = block / w.panels(), panel = block % w.panels(), begin = begins[c];
            gates.resize(std::max<std::size_t>(gates.size(), (begins[c + 1] - begin) * WIDTH));
            float *const own = gates.data();
            coded_columns(w.matrix(2 * chosen[c]), rounded, row_of, c, panel,
                          [&](const float *sums, Index first, Index rows) {
                              std::copy_n(sums, rows * WIDTH, own + (first - begin) * WIDTH);
                          });
            coded_columns(w.matrix(2 * chosen[c] + 1), rounded, row_of, c, panel,
                          [&](const float *sums, Index first, Index rows) {
                              for (Index t = 0; t < rows; ++t)
                                  for (int v = 0; v < 2; ++v)
                                      put_gated(load16(own + (first - begin + t) * WIDTH + v * 16),
                                                load16(sums + t * WIDTH + v * 16), first + t,
                                                panel * WIDTH + v * 16);
                          });
        });
    }

    template <class W>
    void second_product(const W &w, const Rounded &rounded) const {
        const auto row_of = [&](Index place) -> const T * { return middle + place * inner; };
        if (rounded.codes) round(rounded, row_of);
        share(Index(chosen.size()) * w.panels(), threads, [&](Index block) {
            const Index c = block / w.panels(), panel = block % w.panels();
            coded_columns(w.matrix(chosen[c]), rounded, row_of, c, panel,
                          [&](const float *sums, Index first, Index rows) {
                              for (Index t = 0; t < rows; ++t)
                                  for (int v = 0; v < 2; ++v)
                                      put(load16(sums + t * WIDTH + v * 16),
                                          parts + order[first + t] * hidden,
                                          panel * WIDTH + v * 16, hidden);
                          });
        });
    }

    void add_up(Index token) const {
        const std::int32_t *id = ids + token * top_k;
        const float *weight = weights + token * top_k;
        const T *from = parts + token * top_k * hidden;
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

    void run(const ExpertsWeight &gate_up, const ExpertsWeight &down, const RoundedRows &rounded) {
        sort();
        if (Index(order.size()) * hidden * inner < WORTH_SHARING / 3) threads = 1;
        with_weight(gate_up, rounded, inner, hidden,
                    [&](auto w, const Rounded &own) { first_product(w, own); });
        with_weight(down, rounded, hidden, inner,
                    [&](auto w, const Rounded &own) { second_product(w, own); });
        share_rows(tokens, threads, [&](Index token) { add_up(token); });
    }

    // f(the weight of matrices [n, k] as what it is, where its inputs are rounded to: null where not).
    template <class F>
    static void with_weight(const ExpertsWeight &weight, const RoundedRows &rounded, Index n, Index k,
                            const F &f) {
        const auto [codes, scales, minimums, group, bits, is_half, is_rounded] = weight;
        if (bits == 16) {
            if constexpr (std::is_same_v<T, bf16>) f(at<const bf16>(codes), Rounded{});
            return;
        }
        const auto [own, own_scales, own_sums] = is_rounded ? rounded : RoundedRows{};
        const Rounded rows{at<int8_t>(own), at<float>(own_scales), at<float>(own_sums), k,
                           minimums ? 1.0f : -float(1 << (bits - 1))};
        with_weights(codes, scales, minimums, n, k, group, bits, is_half,
                     [&](auto w) { f(w, rows); });
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

void moe_experts(Address x, Index x_stride, ExpertsWeight gate_up, ExpertsWeight down, Address weights,
                 Address ids, RoundedRows rounded, Address middle, Address parts, Address out,
                 Index tokens, Index experts, Index top_k, Index hidden, Index inner, bool gelu,
                 bool is_bf16, int threads) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        Experts<T>{at<const T>(x), at<const float>(weights), at<const std::int32_t>(ids), at<T>(middle),
                   at<T>(parts), at<T>(out), tokens, experts, top_k, hidden, inner, x_stride, gelu,
                   threads}
            .run(gate_up, down, rounded);
    });
}
