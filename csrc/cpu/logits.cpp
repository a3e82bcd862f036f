// What happens to logits before the draw, in place: the model's cap; penalties, biases and bans; grammar masks. The
// specification is in minisgl/kernels/sampling, whose results these are bit for bit, but for the cap.

#include <algorithm>
#include <limits>

#include "sampling.h"
#include "softmax.h"

namespace {

constexpr std::int32_t SEEN_IN_PROMPT = 1 << 30;  // in a count; the bits below count the output

// Rounded before anything is added to it: the compiler would make one multiply-add of both.
float product(float a, float b) {
    const volatile float rounded = a * b;
    return rounded;
}

// One row's penalties for the ids of one piece. Tokens that were not seen keep their logits.
struct Penalties {
    const Params &p;
    float *x;                    // [vocab]
    const std::int32_t *counts;  // [vocab]
    const std::int32_t *drafts;  // [num_drafts] before the point, not counted yet; -1 is none
    const Index num_drafts;

    void apply(Index begin, Index end) const {
        Index v = begin;
        for (; v + 16 <= end; v += 16) {
            if (!any(load_as<i32x16>(counts + v) != 0)) continue;
            for (Index i = v; i < v + 16; ++i)
                if (counts[i]) penalize(i);
        }
        for (; v < end; ++v)
            if (counts[v]) penalize(v);
        for (Index j = 0; j < num_drafts; ++j) {
            const std::int32_t id = drafts[j];
            const bool again = std::find(drafts, drafts + j, id) != drafts + j;
            if (id >= begin && id < end && !counts[id] && !again) penalize(id);
        }
    }

    void penalize(Index id) const {
        const Index drafted = std::count(drafts, drafts + num_drafts, std::int32_t(id));
        const float times = float((counts[id] & (SEEN_IN_PROMPT - 1)) + drafted);
        float y = x[id] > 0.0f ? x[id] / p.repetition : product(x[id], p.repetition);
        y -= product(p.frequency, times);
        if (times > 0.0f) y -= p.presence;
        x[id] = y;
    }
};

}  // namespace

void adjust_logits(Address logits, Address rows, Address positions, Address params,
                   Address bias_ids, Address bias_values, Address counts, Address drafts,
                   Index count, Index vocab, Index max_biases, Index num_drafts, int threads) {
    share_pieces(count, vocab, threads, [&](Index n, Index begin, Index end) {
        const Index row = at<const std::int32_t>(rows)[n];
        const Params &p = at<const Params>(params)[row];
        float *x = at<float>(logits) + n * vocab;
        if (p.needs_counts)
            Penalties{p, x, at<const std::int32_t>(counts) + row * vocab,
                      at<const std::int32_t>(drafts) + n * num_drafts, num_drafts}
                .apply(begin, end);
        const auto *ids = at<const std::int32_t>(bias_ids) + row * max_biases;
        const auto *values = at<const float>(bias_values) + row * max_biases;
        const bool banned = at<const Index>(positions)[n] < p.min_length;
        for (Index i = banned ? 0 : p.num_bans; i < p.num_biases; ++i)
            if (ids[i] >= begin && ids[i] < end) x[ids[i]] += values[i];
    });
}

void cap_logits(Address logits, Index count, Index vocab, float softcap, int threads) {
    share_pieces(count, vocab, threads, [&](Index n, Index begin, Index end) {
        float *x = at<float>(logits) + n * vocab;
        for (Index v = begin; v < end; v += 16) {
            float some[16] = {};
            const Index size = std::min<Index>(end - v, 16);
            std::copy_n(x + v, size, some);
            const f32x16 from = load16(some);
            store16(some, where(from == from, capped(from, softcap), from));
            std::copy_n(some, size, x + v);
        }
    });
}

void mask_logits(Address logits, Address indices, Address bits, Index count, Index vocab,
                 int threads) {
    const f32x16 forbidden = splat(-std::numeric_limits<float>::infinity());
    const auto one = filled<u32x16>(1);
    const u32x16 lanes = one << (u32x16)lane_numbers();
    const Index words = (vocab + 31) / 32;
    share_pieces(count, vocab, threads, [&](Index m, Index begin, Index end) {
        const Index n = at<const std::int32_t>(indices)[m];
        if (n < 0) return;
        float *x = at<float>(logits) + n * vocab;
        const auto *word = at<const std::uint32_t>(bits) + m * words;
        Index v = begin;
        for (; v + 16 <= end; v += 16) {
            const std::uint32_t half = word[v / 32] >> v % 32;
            if ((half & 0xFFFF) != 0xFFFF)
                store16(x + v, where((one * half & lanes) != 0, load16(x + v), forbidden));
        }
        for (; v < end; ++v)
            if (!(word[v / 32] >> v % 32 & 1)) x[v] = forbidden[0];
    });
}
