// Collectives between the processes of one machine, through memory they all map.
//
// Every rank has two slots, used in turn. A collective is: write the own slot, publish its number
// (the epoch), wait until everyone has published it, read the others' slots. Who publishes epoch e
// has read all it needed of e - 1, and a rank that passes e knows this of all: a slot may be written
// again two epochs later. A waiting rank spins and yields shortly, then sleeps: there may be more
// ranks than cores. Sums are taken in rank order, in fp32, so that all ranks hold the same bits.
// The Python twin is gloo, in minisgl/parallel/torch_group.py.

#include <pybind11/pybind11.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "tape.h"
#include "vec.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Index = std::int64_t;

constexpr int SPINS = 300, YIELDS = 20;
constexpr long SLEEP_NS = 20'000'000;  // between checks whether collectives were aborted

struct alignas(128) Line {  // apart, so that no rank's stores disturb another's polling
    std::atomic<std::uint32_t> epoch;
    std::atomic<std::uint32_t> sleepers;
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

// Sleep until woken while `word` is `seen`; SLEEP_NS at most.
void sleep_on(std::atomic<std::uint32_t> &word, std::uint32_t seen) {
#ifdef __linux__
    const timespec length{0, SLEEP_NS};
    syscall(SYS_futex, &word, FUTEX_WAIT, seen, &length, nullptr, 0);
#else
    const timespec length{0, SLEEP_NS / 1000};
    nanosleep(&length, nullptr);
#endif
}

void wake_all(std::atomic<std::uint32_t> &word) {
#ifdef __linux__
    syscall(SYS_futex, &word, FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
#endif
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

class Group {
  public:
    // Maps `fd`, which must hold bytes_needed(size, slot) zero bytes before the first rank begins.
    Group(int fd, int rank, int size, Index slot, double timeout)
        : rank_(rank), size_(size), slot_(slot), timeout_(timeout), bytes_(bytes_needed(size, slot)) {
        void *base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (base == MAP_FAILED) throw std::runtime_error("the ranks' shared memory cannot be mapped");
        lines_ = static_cast<Line *>(base);
        slots_ = static_cast<char *>(base) + (size + 1) * sizeof(Line);
    }
    Group(const Group &) = delete;
    ~Group() { munmap(lines_, bytes_); }

    static std::size_t bytes_needed(int size, Index slot) {
        return (size + 1) * sizeof(Line) + 2 * std::size_t(size) * std::size_t(slot);
    }

    // x[i] = the sum of all ranks' x[i].
    void all_reduce(Address x, Index count, bool is_bf16) {
        is_bf16 ? reduce(reinterpret_cast<bf16 *>(x), count) : reduce(reinterpret_cast<float *>(x), count);
    }

    // On rank 0: out [rows, width] = all ranks' x [rows, bytes] side by side, of which the last may be cut.
    // Elsewhere `out` is not touched.
    void gather(Address x, Address out, Index rows, Index bytes, Index width) {
        const Index all = rows * bytes;
        for (Index i = 0; i < all; i += slot_) {
            const Index end = std::min(i + slot_, all);
            std::memcpy(begin(), reinterpret_cast<const char *>(x) + i, end - i);
            barrier();
            for (int r = 0; rank_ == 0 && r < size_; ++r) {
                for (Index from = i, next; from < end; from = next) {  // a row after the other
                    const Index row = from / bytes, column = r * bytes + from % bytes;
                    next = std::min((row + 1) * bytes, end);
                    if (column < width)
                        std::memcpy(reinterpret_cast<char *>(out) + row * width + column,
                                    slot(r) + (from - i), std::min(next - from, width - column));
                }
            }
        }
    }

    // x = x of rank 0.
    void broadcast(Address x, Index bytes) {
        for (Index i = 0; i < bytes; i += slot_) {
            const Index n = std::min(slot_, bytes - i);
            char *own = begin(), *here = reinterpret_cast<char *>(x) + i;
            if (rank_ == 0) std::memcpy(own, here, n);
            barrier();
            if (rank_ != 0) std::memcpy(here, slot(0), n);
        }
    }

    // From any thread of any rank: everyone who waits, or will, raises.
    void abort() {
        lines_[size_].epoch.store(1);
        for (int r = 0; r < size_; ++r) wake_all(lines_[r].epoch);
    }

  private:
    char *slot(int rank) const { return slots_ + (2 * rank + Index(epoch_ & 1)) * slot_; }

    char *begin() {
        ++epoch_;
        return slot(rank_);
    }

    // A rank counts itself as a sleeper before it reads the epoch for the last time, and the epoch is
    // published before sleepers are counted: so either it sees the epoch, or it is woken.
    void barrier() {
        Line &own = lines_[rank_];
        own.epoch.store(epoch_);
        if (own.sleepers.load()) wake_all(own.epoch);
        for (int r = 0; r < size_; ++r)
            if (r != rank_) wait_for(r);
    }

    bool has_published(std::uint32_t epoch) const { return std::int32_t(epoch - epoch_) >= 0; }

    void wait_for(int rank) const {
        Line &line = lines_[rank];
        for (int i = 0; i < SPINS + YIELDS; ++i) {
            if (has_published(line.epoch.load(std::memory_order_acquire))) return;
            i < SPINS ? pause() : void(sched_yield());
        }
        const double deadline = now() + timeout_;
        ++line.sleepers;
        std::uint32_t seen;
        while (!has_published(seen = line.epoch.load()) && !aborted() && now() < deadline) sleep_on(line.epoch, seen);
        --line.sleepers;
        if (has_published(seen)) return;
        if (aborted()) throw std::runtime_error("collectives were aborted: a rank has ended");
        throw std::runtime_error("rank " + std::to_string(rank) + " did not join a collective within " +
                                 std::to_string(int(timeout_)) + " s");
    }

    bool aborted() const { return lines_[size_].epoch.load() != 0; }

    template <class T>
    void reduce(T *x, Index count) {
        const Index most = slot_ / Index(sizeof(T));
        for (Index first = 0; first < count; first += most) {
            const Index n = std::min(most, count - first);
            std::memcpy(begin(), x + first, n * sizeof(T));
            barrier();
            add(x + first, n);
        }
    }

    template <class T>
    void add(T *out, Index n) const {
        const auto of = [this](int r) { return reinterpret_cast<const T *>(slot(r)); };
        Index i = 0;
        for (; i + 16 <= n; i += 16) {
            f32x16 sum = load16(of(0) + i);
            for (int r = 1; r < size_; ++r) sum += load16(of(r) + i);
            store16(out + i, sum);
        }
        for (; i < n; ++i) {
            float sum = to_float(of(0)[i]);
            for (int r = 1; r < size_; ++r) sum += to_float(of(r)[i]);
            store(out + i, sum);
        }
    }

    const int rank_, size_;
    const Index slot_;
    const double timeout_;
    const std::size_t bytes_;
    std::uint32_t epoch_ = 0;  // wraps around
    Line *lines_;  // one per rank: the epoch it has published; the last one ends all waits
    char *slots_;
};

}  // namespace

PYBIND11_MODULE(rank_ops, m) {
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    py::class_<Group>(m, "Group")
        .def(py::init<int, int, int, Index, double>())
        .def_static("bytes_needed", &Group::bytes_needed)
        .def("all_reduce", recorded(&Group::all_reduce), unlocked)
        .def("gather", recorded(&Group::gather), unlocked)
        .def("broadcast", recorded(&Group::broadcast), unlocked)
        .def("abort", &Group::abort);
    bind_recording(m);
}
