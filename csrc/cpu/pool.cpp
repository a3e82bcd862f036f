// The pool of threads. A job is published by one store of its number and its count of blocks; a thread
// takes a block by lowering the count while the number is still the same, so what it has read of
// the job is of that job (numbers come again after 2^32 jobs).

#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

thread_local int most_threads = std::numeric_limits<int>::max();  // of the jobs that this one calls

constexpr auto SPIN = std::chrono::microseconds(50);  // longer than waking a thread takes

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits for a moment; whether it came to be.
template <class F>
bool spin_until(const F &done) {
    const auto end = std::chrono::steady_clock::now() + SPIN;
    do {
        for (int i = 0; i < 32; ++i, pause())
            if (done()) return true;
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

}  // namespace

class Pool {
  public:
    // One for the process. It is never destroyed: its threads sleep until the process has ended. A fork
    // has none of them, nor who may have held the lock: it gets a pool of its own.
    static Pool &get() {
        static Pool *pool = (pthread_atfork(nullptr, nullptr, [] { pool = new Pool; }), new Pool);
        return *pool;
    }

    void run(std::int64_t count, int threads, Body body, const void *context) {
        threads = int(std::min<std::int64_t>({threads, most_threads, count}));
        std::unique_lock<std::mutex> owner(owner_, std::defer_lock);
        if (threads < 2 || !owner.try_lock()) {
            Blocks blocks(count, 0, false);
            body(context, blocks);
            return;
        }
        while (helpers_ < threads - 1 && start()) {
        }
        body_.store(body, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        count_.store(count, std::memory_order_relaxed);
        wanted_.store(threads - 1, std::memory_order_relaxed);
        unfinished_.store(std::uint32_t(count), std::memory_order_relaxed);
        const std::uint32_t job = ++last_job_;
        state_.store(std::uint64_t(job) << 32 | std::uint64_t(count));
        if (sleepers_.load()) {  // who falls asleep later sees the job
            ++bell_;
            bell_.notify_all();
        }
        join(job);
        if (spin_until([this] { return unfinished_.load() == 0; })) return;
        for (std::uint32_t left; (left = unfinished_.load()) != 0;) unfinished_.wait(left);
    }

    // Lowers the count of blocks left, if the job is still this one. Returns what it was, or 0.
    std::uint32_t take(std::uint32_t job) {
        std::uint64_t state = state_.load();
        while (state >> 32 == job && std::uint32_t(state) != 0)
            if (state_.compare_exchange_weak(state, state - 1)) return std::uint32_t(state);
        return 0;
    }

  private:
    // Works on the job while it has blocks. Its body runs only with a block in hand, which keeps alive
    // what the caller has on its stack.
    void join(std::uint32_t job) {
        Blocks blocks(count_.load(std::memory_order_relaxed), job, true);
        const Body body = body_.load(std::memory_order_relaxed);
        const void *context = context_.load(std::memory_order_relaxed);
        if (!blocks.take()) return;
        blocks.has_first_ = true;
        // A body that threw would leave blocks for which all others wait: it ends the process.
        [&]() noexcept { body(context, blocks); }();
        if (unfinished_.fetch_sub(blocks.taken_) == blocks.taken_) unfinished_.notify_one();
    }

    // One more helper; false where the system gives no thread: then the others do the work.
    bool start() {
        sigset_t ours, before;  // signals are for the threads that Python knows, but for faults
        sigfillset(&ours);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&ours, fault);
        pthread_sigmask(SIG_SETMASK, &ours, &before);
        bool started = true;
        try {
            std::thread([this, helper = helpers_] { work(helper); }).detach();
            ++helpers_;
        } catch (const std::system_error &) {
            started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    void work(int helper) {
        for (std::uint32_t seen = 0;;) {
            const auto there = [&] { return std::uint32_t(state_.load() >> 32) != seen; };
            if (!spin_until(there)) {
                ++sleepers_;
                for (std::uint32_t bell; bell = bell_.load(), !there();) bell_.wait(bell);
                --sleepers_;
            }
            seen = std::uint32_t(state_.load() >> 32);
            if (helper < wanted_.load(std::memory_order_relaxed)) join(seen);
        }
    }

    std::mutex owner_;
    int helpers_ = 0;             // threads there are
    std::uint32_t last_job_ = 0;  // wraps around
    std::atomic<std::uint64_t> state_{0};  // the job's number, and how many blocks are left to take
    std::atomic<std::uint32_t> unfinished_{0};
    std::atomic<std::uint32_t> sleepers_{0}, bell_{0};
    std::atomic<Body> body_{nullptr};
    std::atomic<const void *> context_{nullptr};
    std::atomic<std::int64_t> count_{0};
    std::atomic<int> wanted_{0};  // threads besides the caller's
};

bool Blocks::take() {
    if (!shared_) {
        if (block_ + 1 >= count_) return false;
        ++block_;
        return true;
    }
    const std::uint32_t left = Pool::get().take(job_);
    if (left == 0) return false;
    ++taken_;
    block_ = count_ - left;
    return true;
}

FewerThreads::FewerThreads(int most) : before_(most_threads) { most_threads = most; }
FewerThreads::~FewerThreads() { most_threads = before_; }

void share_work(std::int64_t blocks, int threads, Body body, const void *context) {
    if (blocks > 0) Pool::get().run(blocks, threads, body, context);
}
