// Threads play the ranks of an all-reduce: csrc/cuda/all_reduce_protocol.h under stress.
//
//     all_reduce_ranks RANKS BLOCKS LANES CALLS MODE
//
// Every rank is BLOCKS x LANES threads; a barrier of a rank's threads between calls is what the end
// of a kernel is. Calls have random sizes and kinds, threads random delays. Each sum is compared
// bit for bit with the sum in rank order. MODE plants a fault, "sound" none:
//
//     relaxed       flags are stored without release (a race that ThreadSanitizer sees)
//     one-half      every call uses the same half of the buffers
//     moving-grid   the number of blocks changes from call to call
//     one-barrier   a two-shot call reads the sums without a second barrier
//     dead          the last rank stops half-way: the others must end and say for whom they waited
//     stopped       the same, and the host ends it long before the time limit
//
// Prints one line; exit status 1 when a sum was wrong or a mode ended otherwise than it should.
#include "cuda/all_reduce_protocol.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace ar = minisgl::all_reduce;

namespace {

constexpr int kWidth = 3;      // floats of a row
constexpr int kMaxRows = 40;

class Barrier {
  public:
    explicit Barrier(int count) : count_(count) {}
    void wait() {
        const unsigned phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
        } else {
            while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
        }
    }

  private:
    const int count_;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> phase_{0};
};

struct Test {
    int size, blocks, lanes, calls;
    std::string mode;
    uint64_t timeout_ns = 60'000'000'000;
    std::vector<ar::Signal> signals;
    std::vector<std::vector<float>> data;           // [rank][half, row, column]
    std::vector<std::atomic<uint32_t>> told;        // the word each rank's host reads
    std::atomic<bool> stop{false};
    std::atomic<long> wrong{0}, checked{0}, passed{0};

    Test(int size, int blocks, int lanes, int calls, std::string mode)
        : size(size), blocks(blocks), lanes(lanes), calls(calls), mode(std::move(mode)),
          signals(size), data(size, std::vector<float>(2 * kMaxRows * kWidth)), told(size) {
        std::memset(signals.data(), 0, signals.size() * sizeof(ar::Signal));
        // A few calls before the counters wrap around.
        for (ar::Signal &signal : signals) {
            for (uint32_t &epoch : signal.epoch) epoch = 0u - 10;
            for (auto &barrier : signal.flag)
                for (auto &block : barrier)
                    for (uint32_t &flag : block) flag = 0u - 10;
        }
    }
};

// What rank `rank` adds to element `i` in call `call`: sums depend on their order.
float addend(int call, int rank, int64_t i) {
    std::minstd_rand random(static_cast<unsigned>(call * 7919 + rank * 104729 + i + 1));
    random.discard(2);
    return std::ldexp(static_cast<float>(random() % 16777216), -static_cast<int>(random() % 24));
}

struct Thread {
    Test &test;
    ar::Ranks ranks;
    Barrier &block_barrier;
    int index, lane_;
    std::minstd_rand random;
    int call = 0;
    int64_t rows = 0;
    bool two_shot = false;

    int block() const { return index; }
    int lane() const { return lane_; }
    int lanes() const { return test.lanes; }
    void sync() { block_barrier.wait(); }
    uint32_t load_acquire(const uint32_t *p) {
        std::this_thread::yield();  // threads outnumber cores
        return std::atomic_ref(*const_cast<uint32_t *>(p)).load(std::memory_order_acquire);
    }
    uint32_t load_relaxed(const uint32_t *p) {
        return std::atomic_ref(*const_cast<uint32_t *>(p)).load(std::memory_order_relaxed);
    }
    void store_release(uint32_t *p, uint32_t value) {
        const bool relaxed = test.mode == "relaxed";
        std::atomic_ref(*p).store(value,
                                  relaxed ? std::memory_order_relaxed : std::memory_order_release);
    }
    uint64_t now() {
        return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
    }
    bool stopped() { return test.stop.load(); }
    void report(uint32_t code) { test.told[ranks.rank].store(code); }

    void linger() {
        for (unsigned turns = random() % 8; turns > 5; --turns) std::this_thread::yield();
    }
    float &at(int rank, int half, int64_t row, int column) {
        if (test.mode == "one-half") half = 0;
        return test.data[rank][(half * kMaxRows + row) * kWidth + column];
    }
    int owners() const { return two_shot ? test.size : 1; }
    template <class Work> void each(int owner, Work work) {
        const ar::Rows mine = ar::rows_of(rows, owners(), owner, index);
        for (int64_t row = mine.first; row < mine.end; row += ranks.blocks)
            for (int column = lane_; column < kWidth; column += test.lanes) work(row, column);
    }
    float sum(int half, int64_t row, int column) {
        float total = at(0, half, row, column);
        for (int rank = 1; rank < test.size; ++rank) total += at(rank, half, row, column);
        return total;
    }
    void publish(int half) {
        linger();
        for (int owner = 0; owner < owners(); ++owner)
            each(owner, [&](int64_t row, int column) {
                at(ranks.rank, half, row, column) = addend(call, ranks.rank, row * kWidth + column);
            });
    }
    void reduce(int half) {
        linger();
        each(ranks.rank, [&](int64_t row, int column) {
            const float total = sum(half, row, column);
            at(ranks.rank, half, row, column) = total;
        });
    }
    void finish(int half) {
        linger();
        long wrong = 0, checked = 0;
        for (int owner = 0; owner < owners(); ++owner)
            each(owner, [&](int64_t row, int column) {
                const float found = two_shot ? at(owner, half, row, column) : sum(half, row, column);
                float want = addend(call, 0, row * kWidth + column);
                for (int rank = 1; rank < test.size; ++rank)
                    want += addend(call, rank, row * kWidth + column);
                wrong += std::memcmp(&found, &want, sizeof want) != 0;
                ++checked;
            });
        if (load_relaxed(&ranks.signals[ranks.rank]->fault) != 0) return;  // no sums any more
        test.wrong += wrong;
        test.checked += checked;
    }
    void run_call() {
        if (!two_shot) {
            ar::all_reduce<ar::Path::one_shot>(*this, ranks);
        } else if (test.mode == "one-barrier") {
            ar::Signal &own = *ranks.signals[ranks.rank];
            const uint32_t epoch = own.epoch[index] + 1;
            publish(epoch & 1);
            ar::barrier(*this, ranks, 0, epoch);
            reduce(epoch & 1);
            sync();
            finish(epoch & 1);
            if (lane_ == 0) own.epoch[index] = epoch;
        } else {
            ar::all_reduce<ar::Path::two_shot>(*this, ranks);
        }
    }
};

void run_thread(Test &test, int rank, int block, int lane, Barrier &block_barrier,
                Barrier &kernel_end) {
    ar::Ranks ranks{{}, test.timeout_ns, rank, test.size, test.blocks};
    for (int r = 0; r < test.size; ++r) ranks.signals[r] = &test.signals[r];
    Thread thread{test, ranks, block_barrier, block, lane,
                  std::minstd_rand(static_cast<unsigned>(1 + rank * 1000 + block * 10 + lane))};
    const bool dies = (test.mode == "dead" || test.mode == "stopped") && rank == test.size - 1;
    std::minstd_rand shared(5);
    for (int call = 0; call < (dies ? test.calls / 2 : test.calls); ++call) {
        thread.call = call;
        thread.rows = 1 + shared() % kMaxRows;
        thread.two_shot = shared() % 2;
        if (test.mode == "moving-grid") thread.ranks.blocks = 1 + shared() % test.blocks;
        if (block < thread.ranks.blocks) thread.run_call();
        kernel_end.wait();
        ++test.passed;
    }
}

// Whether the ranks that are left know what happened.
bool ended_well(Test &test) {
    const uint32_t last = test.size - 1;
    if (test.mode == "stopped") {
        for (uint32_t rank = 0; rank < last; ++rank)
            if (test.told[rank] != ar::fault_code(rank, rank)) return false;
    } else if (test.mode == "dead") {
        bool named = false;
        for (uint32_t rank = 0; rank < last; ++rank) {
            if (test.told[rank] == 0) return false;
            named |= (test.told[rank] & 15) == last;
        }
        return named;
    }
    return true;
}

}  // namespace

int main(int count, char **words) {
    if (count != 6) return 2;
    Test test(std::atoi(words[1]), std::atoi(words[2]), std::atoi(words[3]), std::atoi(words[4]),
              words[5]);
    if (test.mode == "dead") test.timeout_ns = 1'000'000'000;
    std::vector<Barrier *> barriers;
    std::vector<std::thread> threads;
    for (int rank = 0; rank < test.size; ++rank) {
        auto *kernel_end = barriers.emplace_back(new Barrier(test.blocks * test.lanes));
        for (int block = 0; block < test.blocks; ++block) {
            auto *block_barrier = barriers.emplace_back(new Barrier(test.lanes));
            for (int lane = 0; lane < test.lanes; ++lane)
                threads.emplace_back(run_thread, std::ref(test), rank, block, lane,
                                     std::ref(*block_barrier), std::ref(*kernel_end));
        }
    }
    if (test.mode == "stopped") {
        // Once what the last rank took part in is over, and the others wait for it.
        const long sound = long(threads.size()) * (test.calls / 2);
        while (test.passed < sound) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        test.stop = true;
    }
    for (std::thread &thread : threads) thread.join();
    for (Barrier *barrier : barriers) delete barrier;
    std::printf("%s: %ld wrong of %ld sums\n", words[5], test.wrong.load(), test.checked.load());
    return test.wrong != 0 || test.checked == 0 || !ended_well(test);
}
