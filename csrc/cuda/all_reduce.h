// One call of the all-reduce as its kernel sees it, and the launch.
#pragma once

#include <cstdint>

#include "cuda/all_reduce_protocol.h"

namespace minisgl::all_reduce {

constexpr int kThreads = 512;  // of every block: the order of additions in a norm depends on it
constexpr int kPackBytes = 16;
constexpr int64_t kMaxRowBytes = 47 * 1024;  // kept in shared memory, of which 48 KiB are free

enum class Type : int { bf16 = 0, fp16 = 1, fp32 = 2 };

// The memory of all ranks, mapped by this one.
struct Memory {
    Ranks ranks;
    char *data[kMaxRanks];  // each rank's two halves
    char *multicast;        // an address that means every rank's `replica`; null without NVLS
    char *replica;          // this rank's two halves behind it
    int64_t half_bytes;
    uint32_t *host_word;    // pinned: written here when a wait failed, by the host to end all waits
};

// out = sum over ranks of in; with a norm: total = out + residual, out = norm(total) * weight.
struct Call {
    Memory memory;
    const char *in;
    char *out;
    const char *residual;
    const char *weight;
    char *total;
    int64_t packs;  // of 16 bytes, in all
    int64_t rows;   // what blocks and owners share out: tokens with a norm, else runs of kThreads
    int64_t width;  // packs of a row; the last row may be short without a norm
    float eps;
    bool unit_offset;
};

// Of a kernel with a norm: a row, and each warp's part of its sum of squares.
constexpr int64_t shared_bytes(const Call &call) {
    return call.width * kPackBytes + kThreads / 32 * static_cast<int64_t>(sizeof(float));
}

// Enqueues one kernel on a cudaStream_t; a cudaError_t. The caller has checked sizes, alignment, and
// that multimem has a multicast address. `norm` says whether residual, weight and total are used.
int launch(Path path, Type type, bool norm, const Call &call, void *stream);

}  // namespace minisgl::all_reduce
