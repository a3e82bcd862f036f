// How the ranks of an all-reduce synchronise: which rows a rank owns, when a block may read, and when
// it may write again. The same source runs in kernels (nvcc) and in threads that stand for ranks
// (g++, under ThreadSanitizer: tests/csrc/all_reduce_ranks.cpp).
//
// Each rank owns a `Signal` and two data halves, all mapped by every peer. One call is one kernel
// of `blocks` blocks per rank; block b of a rank synchronises with block b of its peers only:
//
//   publish  copy the block's rows of the input into the own half `epoch % 2`
//   barrier  tell every peer "block b has published epoch e", wait until every peer has said so
//   reduce   (all but one-shot) sum the rows that this rank owns in place, then a second barrier
//   finish   read the sums: from all ranks' halves (one-shot) or from the rows' owners
//
// Why a half may be written again two calls later. Block b passes the first barrier of epoch e+1
// only when block b of every peer has entered epoch e+1. Kernels of a stream run one after another
// and a kernel ends when all its blocks have, so that peer has then finished all of epoch e, and
// this rank's kernel e+2 starts after all its blocks passed their barriers of e+1. So nobody reads
// half e % 2 any more. This needs the same number of blocks in every call of a communicator, one
// stream order, and nothing of the sizes: they may differ from call to call.
//
// Why a graph replay needs nothing from the host. The epoch lives in device memory and each block
// adds one to its own; flags only grow and are compared by difference, so they may wrap around.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MINISGL_RANKS_FN __host__ __device__ __forceinline__
#else
#define MINISGL_RANKS_FN inline
#endif

namespace minisgl::all_reduce {

constexpr int kMaxRanks = 8;
constexpr int kMaxBlocks = 64;
constexpr uint64_t kPollNs = 1'000'000;  // between checks of the time limit and of the host's word

enum class Path : int { one_shot = 0, two_shot = 1, multimem = 2 };

// One per rank, zeroed once, before any peer can reach it.
struct alignas(128) Signal {
    uint32_t epoch[kMaxBlocks];  // the last finished call; written and read by the owner only
    // flag[barrier][block][peer]: the epoch in which that peer got there; written by that peer. The
    // eight words that a block polls lie in one 32-byte sector.
    alignas(128) uint32_t flag[2][kMaxBlocks][kMaxRanks];
    alignas(128) uint32_t fault;  // not 0: a barrier failed somewhere, do not wait any more
};

// The fault code of a failed wait: which rank waited for which. Never 0.
MINISGL_RANKS_FN uint32_t fault_code(int rank, int awaited) {
    return 0x100u | static_cast<uint32_t>(rank) << 4 | static_cast<uint32_t>(awaited);
}

// Rows first, first + blocks, ... below end: those of one block among the rows of one owner.
// One-shot calls have one owner, of all rows; otherwise ranks own equal runs, the last ones fewer.
struct Rows {
    int64_t first, end;
};

MINISGL_RANKS_FN Rows rows_of(int64_t rows, int owners, int owner, int block) {
    const int64_t each = (rows + owners - 1) / owners;
    const int64_t begin = each * owner < rows ? each * owner : rows;
    const int64_t end = begin + each < rows ? begin + each : rows;
    return {begin + block, end};
}

// A rank, as the protocol sees it.
struct Ranks {
    Signal *signals[kMaxRanks];
    uint64_t timeout_ns;
    int rank;
    int size;
    int blocks;
};

// A Machine is one thread of a block. It has
//   block(), lane(), lanes()   which block, and which of its threads this is
//   sync()                     a barrier of the block's threads, ordering their memory
//   load_acquire(p), store_release(p, v), load_relaxed(p)   at the scope of all ranks
//   now()                      nanoseconds
//   stopped(), report(code)    whether the host ends all waits; tell it of a fault
//   publish(half), reduce(half), finish(half)               the block's work on its rows

template <class Machine>
MINISGL_RANKS_FN void wait_for(Machine &m, const Ranks &ranks, const uint32_t *flag, uint32_t epoch,
                               int peer) {
    Signal &own = *ranks.signals[ranks.rank];
    const uint64_t begin = m.now();
    uint64_t next = begin + kPollNs;
    while (static_cast<int32_t>(m.load_acquire(flag) - epoch) < 0) {
        if (m.load_relaxed(&own.fault) != 0) return;
        const uint64_t now = m.now();
        if (now < next) continue;
        next = now + kPollNs;
        if (m.stopped()) {
            m.store_release(&own.fault, fault_code(ranks.rank, ranks.rank));
            return;
        }
        if (now - begin > ranks.timeout_ns) {
            // Also ends what the peers wait for.
            const uint32_t code = fault_code(ranks.rank, peer);
#pragma unroll 1
            for (int r = 0; r < ranks.size; ++r) m.store_release(&ranks.signals[r]->fault, code);
            return;
        }
    }
}

// Everything the block's threads did before happens before what any peer's block b does after:
// sync orders the threads before the lane that releases, the flag orders that lane before the
// peer's lane that acquires, and the peer's sync orders that lane before its block's threads.
template <class Machine>
MINISGL_RANKS_FN void barrier(Machine &m, const Ranks &ranks, int index, uint32_t epoch) {
    m.sync();
    Signal &own = *ranks.signals[ranks.rank];
#pragma unroll 1  // a release store is a fence: nothing is gained by copies of it
    for (int peer = m.lane(); peer < ranks.size; peer += m.lanes())
        m.store_release(&ranks.signals[peer]->flag[index][m.block()][ranks.rank], epoch);
#pragma unroll 1
    for (int peer = m.lane(); peer < ranks.size; peer += m.lanes())
        wait_for(m, ranks, &own.flag[index][m.block()][peer], epoch, peer);
    m.sync();
}

template <Path path, class Machine>
MINISGL_RANKS_FN void all_reduce(Machine &m, const Ranks &ranks) {
    Signal &own = *ranks.signals[ranks.rank];
    const uint32_t epoch = own.epoch[m.block()] + 1;
    const int half = static_cast<int>(epoch & 1);
    m.publish(half);
    barrier(m, ranks, 0, epoch);
    if constexpr (path != Path::one_shot) {
        // In place: between the barriers only its owner accesses a row of any rank's half.
        m.reduce(half);
        barrier(m, ranks, 1, epoch);
    }
    // A rank that gave up sets `fault` before its next flag: peers do not take its data for a sum.
    // The value is needed last: the load costs no time.
    const uint32_t fault = m.lane() == 0 ? m.load_relaxed(&own.fault) : 0;
    m.finish(half);
    if (fault != 0) m.report(fault);
    // Every thread read the old epoch before the first barrier's sync; the next kernel reads this.
    if (m.lane() == 0) own.epoch[m.block()] = epoch;
}

}  // namespace minisgl::all_reduce
