// The threads that share an op's work. A thread takes a block when it runs and finds one left, so one
// whose core is busy with something else takes few, and one that sleeps takes none: nobody waits
// but for a block that is being worked on. Idle threads spin for a moment, then sleep.

#pragma once

#include <cstdint>

// The blocks of one job, as one of its threads sees them. Each block is given to one thread.
class Blocks {
  public:
    Blocks(std::int64_t count, std::uint32_t job, bool shared)
        : count_(count), job_(job), shared_(shared) {}

    // The next block, from 0 on; false when none is left.
    bool next(std::int64_t &block) {
        if (has_first_)
            has_first_ = false;
        else if (!take())
            return false;
        block = block_;
        return true;
    }

  private:
    friend class Pool;

    bool take();

    const std::int64_t count_;
    const std::uint32_t job_;
    const bool shared_;       // with other threads
    bool has_first_ = false;  // taken, not given yet
    std::int64_t block_ = -1;
    std::uint32_t taken_ = 0;
};

using Body = void (*)(const void *context, Blocks &blocks);

// Calls body(context, blocks) in the calling thread and in up to `threads` - 1 others that find blocks
// left; returns when all blocks are done. Callers in several threads at once do not wait for each
// other: one of them has the pool, the others work alone. Bodies must not throw.
void share_work(std::int64_t blocks, int threads, Body body, const void *context);

// Until it ends, no op that this thread calls is shared by more than `most` threads.
class FewerThreads {
  public:
    explicit FewerThreads(int most);
    ~FewerThreads();
    FewerThreads(const FewerThreads &) = delete;
    FewerThreads &operator=(const FewerThreads &) = delete;

  private:
    const int before_;
};

// f(blocks) in several threads: for what a thread sets up once.
template <class F>
void share_blocks(std::int64_t blocks, int threads, const F &f) {
    share_work(
        blocks, threads, [](const void *own, Blocks &part) { (*static_cast<const F *>(own))(part); },
        &f);
}

// f(block) for each of `blocks` blocks.
template <class F>
void share(std::int64_t blocks, int threads, const F &f) {
    share_blocks(blocks, threads, [&f](Blocks &part) {
        for (std::int64_t block; part.next(block);) f(block);
    });
}

// f(row) for each of `rows` rows, which threads take some at a time.
template <class F>
void share_rows(std::int64_t rows, int threads, const F &f) {
    const std::int64_t size = threads > 1 ? (rows + 4 * threads - 1) / (4 * threads) : rows;
    share(rows == 0 ? 0 : (rows + size - 1) / size, threads, [&](std::int64_t block) {
        const std::int64_t end = (block + 1) * size < rows ? (block + 1) * size : rows;
        for (std::int64_t row = block * size; row < end; ++row) f(row);
    });
}
