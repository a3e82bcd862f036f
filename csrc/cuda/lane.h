// What a thread of a block can do, for kernels of all modules: PTX and CUDA's functions, in one place.
//
// Kernels written on these alone also run on a CPU: tests/csrc/emulated has another file of this
// name, in which the threads of all blocks take turns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define MINISGL_DEVICE __device__ __forceinline__

namespace minisgl::lane {

using bf16 = __nv_bfloat16;
using fp16 = __half;

MINISGL_DEVICE int block() { return blockIdx.x; }
MINISGL_DEVICE int index() { return threadIdx.x; }
MINISGL_DEVICE void sync() { __syncthreads(); }
MINISGL_DEVICE float shuffle_xor(float x, int distance) {
    return __shfl_xor_sync(~0u, x, distance);
}
MINISGL_DEVICE char *shared_memory() {
    extern __shared__ uint4 shared[];
    return reinterpret_cast<char *>(shared);
}

MINISGL_DEVICE float widen(bf16 x) { return __bfloat162float(x); }
MINISGL_DEVICE float widen(fp16 x) { return __half2float(x); }
MINISGL_DEVICE float widen(float x) { return x; }
template <class T> MINISGL_DEVICE T narrow(float x);
template <> MINISGL_DEVICE bf16 narrow(float x) { return __float2bfloat16_rn(x); }
template <> MINISGL_DEVICE fp16 narrow(float x) { return __float2half_rn(x); }
template <> MINISGL_DEVICE float narrow(float x) { return x; }
MINISGL_DEVICE float inverse_root(float x) { return rsqrtf(x); }

// Of words that other devices and the host read and write too.
MINISGL_DEVICE uint32_t load_acquire(const uint32_t *p) {
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MINISGL_DEVICE uint32_t load_relaxed(const uint32_t *p) {
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MINISGL_DEVICE void store_release(uint32_t *p, uint32_t v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MINISGL_DEVICE uint64_t now_ns() {
    uint64_t ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns)::"memory");
    return ns;
}

// 16 bytes of sums over all replicas behind a multicast address, with fp32 accumulators, in the
// switch's order; and 16 bytes stored to all of them. sm_90 and later.
template <class T> MINISGL_DEVICE void switch_sum(uint32_t (&v)[4], const char *p) {
#if __CUDA_ARCH__ >= 900
    if constexpr (sizeof(T) == 4)
        asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "l"(p)
                     : "memory");
    else if constexpr (__is_same(T, fp16))
        asm volatile(
            "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0,%1,%2,%3}, [%4];"
            : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
            : "l"(p)
            : "memory");
    else
        asm volatile(
            "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0,%1,%2,%3}, [%4];"
            : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
            : "l"(p)
            : "memory");
#else
    __trap();  // the host does not offer it to such a device
#endif
}
MINISGL_DEVICE void switch_store(char *p, const uint32_t (&v)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
#endif
}
// Between accesses to the same bytes by their own and by a multicast address.
MINISGL_DEVICE void alias_fence() { asm volatile("fence.proxy.alias;" ::: "memory"); }

}  // namespace minisgl::lane
