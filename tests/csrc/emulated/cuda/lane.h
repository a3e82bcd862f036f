// csrc/cuda/lane.h for a CPU: the threads of all blocks of all devices are fibers that take turns.
//
// One fiber runs at a time, until it waits: at a barrier, in a shuffle, or where it looks at a flag.
// That shows wrong indices and, since whoever plays the kernels lets warps stall, missing barriers;
// memory orders it does not show.
#pragma once

#include <ucontext.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define MINISGL_DEVICE inline

namespace minisgl::lane {

constexpr int kWarp = 32;

// Fibers that wait for each other.
class Barrier {
  public:
    explicit Barrier(int count = 0) : count_(count) {}
    void wait();
    unsigned phase() const { return phase_; }

  private:
    int count_, arrived_ = 0;
    unsigned phase_ = 0;
};

struct Block {
    int index;
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<float> exchanged;
    std::vector<char> shared;

    Block(int index, int lanes, int64_t shared_bytes)
        : index(index), all(lanes), warps(lanes / kWarp, Barrier(kWarp)), exchanged(lanes),
          shared(shared_bytes + 16) {}
};

struct Fiber {
    ucontext_t context;
    Block *block;
    int index;
    const Barrier *at = nullptr;  // waits here while the phase is this one
    unsigned phase = 0;

    bool blocked() const { return at != nullptr && at->phase() == phase; }
};

inline Fiber *current = nullptr;
inline ucontext_t scheduler;
inline void yield() { swapcontext(&current->context, &scheduler); }

inline void Barrier::wait() {
    const unsigned phase = phase_;
    if (++arrived_ == count_) {
        arrived_ = 0;
        ++phase_;
    }
    current->at = this;
    current->phase = phase;
    while (phase_ == phase) yield();
    current->at = nullptr;
}

inline int block() { return current->block->index; }
inline int index() { return current->index; }
inline void sync() { current->block->all.wait(); }
inline char *shared_memory() {
    char *bytes = current->block->shared.data();
    return bytes + (16 - reinterpret_cast<uintptr_t>(bytes) % 16) % 16;
}
inline float shuffle_xor(float x, int distance) {
    Block &here = *current->block;
    Barrier &warp = here.warps[current->index / kWarp];
    here.exchanged[current->index] = x;
    warp.wait();
    const float other = here.exchanged[current->index ^ distance];
    warp.wait();
    return other;
}

struct bf16 {
    uint16_t bits;
};
using fp16 = _Float16;

inline float widen(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline float widen(fp16 x) { return static_cast<float>(x); }
inline float widen(float x) { return x; }
template <class T> T narrow(float x) { return static_cast<T>(x); }
template <> inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest even
}
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }

inline uint32_t load_acquire(const uint32_t *p) {
    yield();
    return *p;
}
inline uint32_t load_relaxed(const uint32_t *p) { return *p; }
inline void store_release(uint32_t *p, uint32_t v) { *p = v; }
inline uint64_t now_ns() {
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

// The switch: an address in `window` means that place in every replica.
inline char *window = nullptr;
inline std::vector<char *> replicas;

template <class T> void switch_sum(uint32_t (&v)[4], const char *p) {
    constexpr int n = 16 / sizeof(T);
    T total[n];
    for (int k = 0; k < n; ++k) {
        float sum = 0.0f;
        for (char *replica : replicas) {
            T part;
            std::memcpy(&part, replica + (p - window) + k * sizeof(T), sizeof part);
            sum += widen(part);
        }
        total[k] = narrow<T>(sum);
    }
    std::memcpy(v, total, sizeof v);
}
inline void switch_store(char *p, const uint32_t (&v)[4]) {
    for (char *replica : replicas) std::memcpy(replica + (p - window), v, sizeof v);
}
inline void alias_fence() {}

}  // namespace minisgl::lane
