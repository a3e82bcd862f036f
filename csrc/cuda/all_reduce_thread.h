// What a thread of an all-reduce kernel moves, adds and normalises, as the protocol's Machine.
//
// Sums are taken in rank order in fp32 and rounded once, so one-shot and two-shot calls give the
// same bits on every rank. A two-shot or multimem call sums each row on one rank only. The switch
// chooses its own order of additions in a multimem call: the same bits everywhere, but others.
#pragma once

#include "cuda/all_reduce.h"
#include "cuda/lane.h"

namespace minisgl::all_reduce {

template <class T> struct alignas(kPackBytes) Pack {
    static constexpr int size = kPackBytes / sizeof(T);
    T x[size];
};

// The protocol's Machine: one thread of a kernel's block.
template <class T, Path path, bool norm> struct Thread {
    const Call &call;
    Pack<T> *row_sums;  // shared memory, one row

    MINISGL_DEVICE int block() const { return lane::block(); }
    MINISGL_DEVICE int lane() const { return lane::index(); }
    MINISGL_DEVICE int lanes() const { return kThreads; }
    MINISGL_DEVICE void sync() { lane::sync(); }
    MINISGL_DEVICE uint32_t load_acquire(const uint32_t *p) { return lane::load_acquire(p); }
    MINISGL_DEVICE uint32_t load_relaxed(const uint32_t *p) { return lane::load_relaxed(p); }
    MINISGL_DEVICE void store_release(uint32_t *p, uint32_t v) { lane::store_release(p, v); }
    MINISGL_DEVICE uint64_t now() { return lane::now_ns(); }
    MINISGL_DEVICE bool stopped() { return load_relaxed(call.memory.host_word) != 0; }
    MINISGL_DEVICE void report(uint32_t code) { store_release(call.memory.host_word, code); }

    MINISGL_DEVICE const Memory &memory() const { return call.memory; }
    MINISGL_DEVICE int owners() const {
        return path == Path::one_shot ? 1 : memory().ranks.size;
    }
    // The half that this rank fills: of its own buffer, or of its replica behind the multicast.
    MINISGL_DEVICE Pack<T> *own(int half) const {
        char *base = path == Path::multimem ? memory().replica : memory().data[memory().ranks.rank];
        return reinterpret_cast<Pack<T> *>(base + half * memory().half_bytes);
    }
    template <class Work> MINISGL_DEVICE void each_row(int owner, Work work) const {
        const Rows rows = rows_of(call.rows, owners(), owner, lane::block());
        for (int64_t row = rows.first; row < rows.end; row += memory().ranks.blocks) work(row);
    }
    template <class Work> MINISGL_DEVICE void each_pack(int64_t row, Work work) const {
        for (int64_t j = lane::index(); j < call.width; j += kThreads) {
            const int64_t i = row * call.width + j;
            if (norm || i < call.packs) work(i, j);
        }
    }

    // All loads are issued before the first addition. Plain loads: the data changes while the
    // kernel runs, so the read-only cache must stay out of it.
    MINISGL_DEVICE Pack<T> sum(int half, int64_t i) const {
        Pack<T> parts[kMaxRanks];
#pragma unroll
        for (int r = 0; r < kMaxRanks; ++r)
            if (r < memory().ranks.size)
                parts[r] = reinterpret_cast<const Pack<T> *>(
                    memory().data[r] + half * memory().half_bytes)[i];
        Pack<T> total;
#pragma unroll
        for (int k = 0; k < Pack<T>::size; ++k) {
            float x = lane::widen(parts[0].x[k]);
#pragma unroll
            for (int r = 1; r < kMaxRanks; ++r)
                if (r < memory().ranks.size) x += lane::widen(parts[r].x[k]);
            total.x[k] = lane::narrow<T>(x);
        }
        return total;
    }

    MINISGL_DEVICE void publish(int half) {
        const Pack<T> *in = reinterpret_cast<const Pack<T> *>(call.in);
        Pack<T> *mine = own(half);
        for (int owner = 0; owner < owners(); ++owner)
            each_row(owner, [&](int64_t row) {
                each_pack(row, [&](int64_t i, int64_t) { mine[i] = in[i]; });
            });
    }

    MINISGL_DEVICE void reduce(int half) {
        if constexpr (path == Path::multimem) lane::alias_fence();
        each_row(memory().ranks.rank, [&](int64_t row) {
            each_pack(row, [&](int64_t i, int64_t) {
                if constexpr (path == Path::multimem) {
                    char *p = memory().multicast + half * memory().half_bytes + i * kPackBytes;
                    uint32_t v[4] = {};
                    lane::switch_sum<T>(v, p);
                    lane::switch_store(p, v);
                } else {
                    own(half)[i] = sum(half, i);
                }
            });
        });
        if constexpr (path == Path::multimem) lane::alias_fence();
    }

    MINISGL_DEVICE Pack<T> summed(int half, int owner, int64_t i) const {
        if constexpr (path == Path::one_shot) return sum(half, i);
        if constexpr (path == Path::multimem) return own(half)[i];
        return reinterpret_cast<const Pack<T> *>(memory().data[owner] +
                                                 half * memory().half_bytes)[i];
    }

    MINISGL_DEVICE void finish(int half) {
        Pack<T> *out = reinterpret_cast<Pack<T> *>(call.out);
        for (int owner = 0; owner < owners(); ++owner)
            each_row(owner, [&](int64_t row) {
                if constexpr (norm) {
                    finish_norm(half, owner, row);
                } else {
                    each_pack(row, [&](int64_t i, int64_t) { out[i] = summed(half, owner, i); });
                }
            });
    }

    // As the separate kernels would: the sum is rounded, its sum with the residual is rounded, and
    // what a reader of that gets is what is normalised. A thread reads only the packs that it wrote.
    MINISGL_DEVICE void finish_norm(int half, int owner, int64_t row) {
        float squares = 0.0f;
        each_pack(row, [&](int64_t i, int64_t j) {
            const Pack<T> added = reinterpret_cast<const Pack<T> *>(call.residual)[i];
            Pack<T> total = summed(half, owner, i);
#pragma unroll
            for (int k = 0; k < Pack<T>::size; ++k) {
                total.x[k] = lane::narrow<T>(lane::widen(total.x[k]) + lane::widen(added.x[k]));
                squares += lane::widen(total.x[k]) * lane::widen(total.x[k]);
            }
            reinterpret_cast<Pack<T> *>(call.total)[i] = total;
            row_sums[j] = total;
        });
        const float mean = block_sum(squares) / static_cast<float>(call.width * Pack<T>::size);
        const float scale = lane::inverse_root(mean + call.eps);
        each_pack(row, [&](int64_t i, int64_t j) {
            const Pack<T> weight = reinterpret_cast<const Pack<T> *>(call.weight)[j];
            const Pack<T> total = row_sums[j];
            Pack<T> y;
#pragma unroll
            for (int k = 0; k < Pack<T>::size; ++k) {
                const float w = lane::widen(weight.x[k]) + (call.unit_offset ? 1.0f : 0.0f);
                y.x[k] = lane::narrow<T>(lane::widen(total.x[k]) * scale * w);
            }
            reinterpret_cast<Pack<T> *>(call.out)[i] = y;
        });
    }

    // In a fixed order: the same bits on every rank, by every path.
    MINISGL_DEVICE float block_sum(float x) {
        float *parts = reinterpret_cast<float *>(row_sums + call.width);
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            x += lane::shuffle_xor(x, distance);
        if (lane::index() % 32 == 0) parts[lane::index() / 32] = x;
        lane::sync();
        x = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kThreads / 32; ++warp) x += parts[warp];
        lane::sync();  // before the next row's parts
        return x;
    }
};

}  // namespace minisgl::all_reduce
