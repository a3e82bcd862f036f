// What the files of minisgl.kernels.sampling share: a row's record, and the pieces that rows of logits
// are cut into. Pieces are of a fixed size, so that nothing depends on the number of threads.

#pragma once

#include <algorithm>

#include "model_ops.h"
#include "pool.h"

// minisgl.kernels.sampling.PARAMS.
struct Params {
    float temperature, top_p, min_p, repetition, presence, frequency;
    std::int32_t top_k, min_length, num_bans, num_biases;
    std::uint64_t key;
    std::int32_t needs_counts, unused;
};
static_assert(sizeof(Params) == 56);

constexpr Index PIECE = 1 << 13;  // logits: they stay in the first cache

inline Index pieces_of(Index vocab) { return (vocab + PIECE - 1) / PIECE; }

inline int threads_for(Index logits, int threads) {
    return logits < (1 << 15) ? 1 : threads;  // waking a thread for fewer costs more
}

// f(row, begin, end) for every piece of `count` rows.
template <class F>
void share_pieces(Index count, Index vocab, int threads, const F &f) {
    const Index each = pieces_of(vocab);
    share(count * each, threads_for(count * vocab, threads), [&](Index block) {
        const Index begin = block % each * PIECE;
        f(block / each, begin, std::min(begin + PIECE, vocab));
    });
}

inline bool any(i32x16 mask) {
    const auto eight = low_half(mask) | high_half(mask);
    std::uint64_t words[4];
    store_as(words, eight);
    return (words[0] | words[1] | words[2] | words[3]) != 0;
}
