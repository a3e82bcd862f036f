// The kernels of the all-reduce over peer-mapped memory, alone or with the residual addition and
// RMSNorm after it, and their launch. The protocol, and why it is right, are in
// all_reduce_protocol.h; what a thread does is in all_reduce_thread.h.
#include "cuda/all_reduce.h"
#include "cuda/all_reduce_thread.h"

namespace minisgl::all_reduce {
namespace {

template <class T, Path path, bool norm>
__global__ void __launch_bounds__(kThreads, 1) all_reduce_kernel(const __grid_constant__ Call call) {
    Thread<T, path, norm> thread{call, reinterpret_cast<Pack<T> *>(lane::shared_memory())};
    all_reduce<path>(thread, call.memory.ranks);
}

template <class T, Path path> cudaError_t start(bool norm, const Call &call, cudaStream_t stream) {
    const int blocks = call.memory.ranks.blocks;
    if (norm)
        all_reduce_kernel<T, path, true>
            <<<blocks, kThreads, shared_bytes(call), stream>>>(call);
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

int launch(Path path, Type type, bool norm, const Call &call, void *on) {
    const cudaStream_t stream = static_cast<cudaStream_t>(on);
    switch (type) {
        case Type::bf16: return pick<lane::bf16>(path, norm, call, stream);
        case Type::fp16: return pick<lane::fp16>(path, norm, call, stream);
        case Type::fp32: return pick<float>(path, norm, call, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace minisgl::all_reduce
