// All-reduce over peer-mapped memory, alone or with the residual addition and RMSNorm after it.
// The protocol, and why it is right, are in all_reduce_protocol.h; here is what a block moves.
//
// Sums are taken in rank order in fp32 and rounded once, so one-shot and two-shot calls give the
// same bits on every rank. A two-shot or multimem call sums each row on one rank only. The switch
// chooses its own order of additions in a multimem call: the same bits everywhere, but others.
#include "cuda/all_reduce.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace minisgl::all_reduce {
namespace {

__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(float x) { return x; }
template <class T> __device__ T narrow(float x);
template <> __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __half narrow(float x) { return __float2half_rn(x); }
template <> __device__ float narrow(float x) { return x; }

template <class T> struct alignas(kPackBytes) Pack {
    static constexpr int size = kPackBytes / sizeof(T);
    T x[size];
};

// Sums of all ranks' replicas, made by the switch with fp32 accumulators, and a store to all.
// PTX: multimem.ld_reduce and multimem.st, sm_90 and later.
template <class T> __device__ void switch_sum(uint32_t (&v)[4], const char *p) {
#if __CUDA_ARCH__ >= 900
    if constexpr (sizeof(T) == 4)
        asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p) : "memory");
    else if constexpr (__is_same(T, __half))
        asm volatile(
            "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0,%1,%2,%3}, [%4];"
            : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p) : "memory");
    else
        asm volatile(
            "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0,%1,%2,%3}, [%4];"
            : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p) : "memory");
#else
    __trap();  // the host does not offer it to such a device
#endif
}

__device__ void switch_store(char *p, const uint32_t (&v)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1,%2,%3,%4};"
                 :: "l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
#endif
}

// The same bytes are reached by their own and by the multicast address: PTX wants this fence
// between the two on the way of synchronisation.
__device__ void alias_fence() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// The protocol's Machine: one thread of a kernel's block.
template <class T, Path path, bool norm> struct Thread {
    const Call &call;
    Pack<T> *row_sums;  // shared memory, one row

    __device__ int block() const { return blockIdx.x; }
    __device__ int lane() const { return threadIdx.x; }
    __device__ int lanes() const { return kThreads; }
    __device__ void sync() { __syncthreads(); }
    __device__ uint32_t load_acquire(const uint32_t *p) {
        uint32_t v;
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
        return v;
    }
    __device__ uint32_t load_relaxed(const uint32_t *p) {
        uint32_t v;
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
        return v;
    }
    __device__ void store_release(uint32_t *p, uint32_t v) {
        asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
    }
    __device__ uint64_t now() {
        uint64_t ns;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns) :: "memory");
        return ns;
    }
    __device__ bool stopped() { return load_relaxed(call.memory.host_word) != 0; }
    __device__ void report(uint32_t code) { store_release(call.memory.host_word, code); }

    __device__ const Memory &memory() const { return call.memory; }
    __device__ int owners() const {
        return path == Path::one_shot ? 1 : memory().ranks.size;
    }
    // The half that this rank fills: of its own buffer, or of its replica behind the multicast.
    __device__ Pack<T> *own(int half) const {
        char *base = path == Path::multimem ? memory().replica : memory().data[memory().ranks.rank];
        return reinterpret_cast<Pack<T> *>(base + half * memory().half_bytes);
    }
    template <class Work> __device__ void each_row(int owner, Work work) const {
        const Rows rows = rows_of(call.rows, owners(), owner, blockIdx.x);
        for (int64_t row = rows.first; row < rows.end; row += memory().ranks.blocks) work(row);
    }
    template <class Work> __device__ void each_pack(int64_t row, Work work) const {
        for (int64_t j = threadIdx.x; j < call.width; j += kThreads) {
            const int64_t i = row * call.width + j;
            if (norm || i < call.packs) work(i, j);
        }
    }

    // All loads are issued before the first addition. Plain loads: the data changes while the
    // kernel runs, so the read-only cache must stay out of it.
    __device__ Pack<T> sum(int half, int64_t i) const {
        Pack<T> parts[kMaxRanks];
#pragma unroll
        for (int r = 0; r < kMaxRanks; ++r)
            if (r < memory().ranks.size)
                parts[r] = reinterpret_cast<const Pack<T> *>(
                    memory().data[r] + half * memory().half_bytes)[i];
        Pack<T> total;
#pragma unroll
        for (int k = 0; k < Pack<T>::size; ++k) {
            float x = widen(parts[0].x[k]);
#pragma unroll
            for (int r = 1; r < kMaxRanks; ++r)
                if (r < memory().ranks.size) x += widen(parts[r].x[k]);
            total.x[k] = narrow<T>(x);
        }
        return total;
    }

    __device__ void publish(int half) {
        const Pack<T> *in = reinterpret_cast<const Pack<T> *>(call.in);
        Pack<T> *mine = own(half);
        for (int owner = 0; owner < owners(); ++owner)
            each_row(owner, [&](int64_t row) {
                each_pack(row, [&](int64_t i, int64_t) { mine[i] = in[i]; });
            });
    }

    __device__ void reduce(int half) {
        if constexpr (path == Path::multimem) alias_fence();
        each_row(memory().ranks.rank, [&](int64_t row) {
            each_pack(row, [&](int64_t i, int64_t) {
                if constexpr (path == Path::multimem) {
                    char *p = memory().multicast + half * memory().half_bytes + i * kPackBytes;
                    uint32_t v[4] = {};
                    switch_sum<T>(v, p);
                    switch_store(p, v);
                } else {
                    own(half)[i] = sum(half, i);
                }
            });
        });
        if constexpr (path == Path::multimem) alias_fence();
    }

    __device__ Pack<T> summed(int half, int owner, int64_t i) const {
        if constexpr (path == Path::one_shot) return sum(half, i);
        if constexpr (path == Path::multimem) return own(half)[i];
        return reinterpret_cast<const Pack<T> *>(memory().data[owner] +
                                                 half * memory().half_bytes)[i];
    }

    __device__ void finish(int half) {
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
    // what a reader of that gets is what is normalised. A thread meets its own packs only.
    __device__ void finish_norm(int half, int owner, int64_t row) {
        float squares = 0.0f;
        each_pack(row, [&](int64_t i, int64_t j) {
            const Pack<T> added = reinterpret_cast<const Pack<T> *>(call.residual)[i];
            Pack<T> total = summed(half, owner, i);
#pragma unroll
            for (int k = 0; k < Pack<T>::size; ++k) {
                total.x[k] = narrow<T>(widen(total.x[k]) + widen(added.x[k]));
                squares += widen(total.x[k]) * widen(total.x[k]);
            }
            reinterpret_cast<Pack<T> *>(call.total)[i] = total;
            row_sums[j] = total;
        });
        const float mean = block_sum(squares) / static_cast<float>(call.width * Pack<T>::size);
        const float scale = rsqrtf(mean + call.eps);
        each_pack(row, [&](int64_t i, int64_t j) {
            const Pack<T> weight = reinterpret_cast<const Pack<T> *>(call.weight)[j];
            const Pack<T> total = row_sums[j];
            Pack<T> y;
#pragma unroll
            for (int k = 0; k < Pack<T>::size; ++k) {
                const float w = widen(weight.x[k]) + (call.unit_offset ? 1.0f : 0.0f);
                y.x[k] = narrow<T>(widen(total.x[k]) * scale * w);
            }
            reinterpret_cast<Pack<T> *>(call.out)[i] = y;
        });
    }

    // In a fixed order: the same bits on every rank, by every path.
    __device__ float block_sum(float x) {
        __shared__ float parts[kThreads / 32];
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            x += __shfl_xor_sync(~0u, x, distance);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
        __syncthreads();
        x = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kThreads / 32; ++warp) x += parts[warp];
        __syncthreads();  // before the next row's parts
        return x;
    }
};

template <class T, Path path, bool norm>
__global__ void __launch_bounds__(kThreads, 1) all_reduce_kernel(const __grid_constant__ Call call) {
    extern __shared__ uint4 shared[];
    Thread<T, path, norm> thread{call, reinterpret_cast<Pack<T> *>(shared)};
    all_reduce<path>(thread, call.memory.ranks);
}

template <class T, Path path> cudaError_t start(bool norm, const Call &call, cudaStream_t stream) {
    const int blocks = call.memory.ranks.blocks;
    if (norm)
        all_reduce_kernel<T, path, true>
            <<<blocks, kThreads, call.width * kPackBytes, stream>>>(call);
    else
        all_reduce_kernel<T, path, false><<<blocks, kThreads, 0, stream>>>(call);
    return cudaGetLastError();
}

template <class T>
cudaError_t pick(Path path, bool norm, const Call &call, cudaStream_t stream) {
    switch (path) {
        case Path::one_shot: return start<T, Path::one_shot>(norm, call, stream);
        case Path::two_shot: return start<T, Path::two_shot>(norm, call, stream);
        case Path::multimem: return start<T, Path::multimem>(norm, call, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch(Path path, Type type, bool norm, const Call &call, cudaStream_t stream) {
    switch (type) {
        case Type::bf16: return pick<__nv_bfloat16>(path, norm, call, stream);
        case Type::fp16: return pick<__half>(path, norm, call, stream);
        case Type::fp32: return pick<float>(path, norm, call, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace minisgl::all_reduce
