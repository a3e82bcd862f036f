// The kernels of the all-reduce on a CPU: csrc/cuda/all_reduce_thread.h over emulated/cuda/lane.h.
//
// Python enqueues calls for each rank, as onto a stream; `run` plays all ranks at once, each its own
// calls in order, a call beginning when all blocks of the one before have ended. Ranks run ahead of
// each other as far as the protocol lets them.
#include "cuda/all_reduce_thread.h"

#include <deque>
#include <memory>

namespace ar = minisgl::all_reduce;
namespace lane = minisgl::lane;

namespace {

constexpr size_t kStackBytes = 32 * 1024;

struct Work {
    ar::Path path;
    ar::Type type;
    bool norm;
    ar::Call call;
};

std::vector<std::deque<Work>> queues;

template <class T, ar::Path path> void play(const Work &work) {
    auto *row = reinterpret_cast<ar::Pack<T> *>(lane::shared_memory());
    if (work.norm) {
        ar::Thread<T, path, true> thread{work.call, row};
        ar::all_reduce<path>(thread, work.call.memory.ranks);
    } else {
        ar::Thread<T, path, false> thread{work.call, row};
        ar::all_reduce<path>(thread, work.call.memory.ranks);
    }
}

template <class T> void pick(const Work &work) {
    switch (work.path) {
        case ar::Path::one_shot: return play<T, ar::Path::one_shot>(work);
        case ar::Path::two_shot: return play<T, ar::Path::two_shot>(work);
        case ar::Path::multimem: return play<T, ar::Path::multimem>(work);
    }
}

// One kernel under way.
struct Kernel {
    const Work *work;
    std::vector<std::unique_ptr<lane::Block>> blocks;
    std::vector<std::unique_ptr<lane::Fiber>> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;
    size_t left = 0;
};

Kernel *kernel_under_way = nullptr;

void fiber_main() {
    Kernel &kernel = *kernel_under_way;
    const Work &work = *kernel.work;
    switch (work.type) {
        case ar::Type::bf16: pick<lane::bf16>(work); break;
        case ar::Type::fp16: pick<lane::fp16>(work); break;
        case ar::Type::fp32: pick<float>(work); break;
    }
    lane::current->block = nullptr;  // ended
    kernel.left -= 1;
    lane::yield();
}

std::unique_ptr<lane::Fiber> make_fiber(Kernel &kernel, int index) {
    auto fiber = std::make_unique<lane::Fiber>();
    fiber->block = kernel.blocks.back().get();
    fiber->index = index;
    kernel.stacks.push_back(std::make_unique_for_overwrite<char[]>(kStackBytes));
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = kernel.stacks.back().get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    return fiber;
}

std::unique_ptr<Kernel> start(const Work &work) {
    auto kernel = std::make_unique<Kernel>();
    kernel->work = &work;
    const int64_t shared = work.norm ? ar::shared_bytes(work.call) : 0;
    for (int block = 0; block < work.call.memory.ranks.blocks; ++block) {
        kernel->blocks.push_back(std::make_unique<lane::Block>(block, ar::kThreads, shared));
        for (int index = 0; index < ar::kThreads; ++index)
            kernel->fibers.push_back(make_fiber(*kernel, index));
    }
    kernel->left = kernel->fibers.size();
    return kernel;
}

// A turn of each of the kernel's threads, but for warps that stall, as one may, for many turns; what
// the others run into meanwhile is what barriers are for.
void turn(Kernel &kernel, unsigned round) {
    constexpr unsigned stall = 16;
    kernel_under_way = &kernel;
    for (size_t i = 0; i < kernel.fibers.size(); ++i) {
        const unsigned dice = (round / stall * 2654435761u) ^ static_cast<unsigned>(i / lane::kWarp);
        if ((dice * 2246822519u >> 16) % 4 == 0) continue;
        lane::current = kernel.fibers[i].get();
        if (lane::current->block != nullptr && !lane::current->blocked())
            swapcontext(&lane::scheduler, &lane::current->context);
    }
}

}  // namespace

extern "C" {

int signal_bytes() { return sizeof(ar::Signal); }
int max_row_bytes() { return ar::kMaxRowBytes; }

void reset(int ranks, char *window, char *const *replicas) {
    queues.assign(ranks, {});
    lane::window = window;
    lane::replicas.assign(replicas, replicas + (window == nullptr ? 0 : ranks));
}

void enqueue(int path, int type, int norm, int rank, int ranks, int blocks, char *const *signals,
             char *const *data, char *multicast, char *replica, int64_t half_bytes,
             uint32_t *host_word, uint64_t timeout_ns, const char *in, char *out,
             const char *residual, const char *weight, char *total, int64_t packs, int64_t rows,
             int64_t width, float eps, int unit_offset) {
    Work work{static_cast<ar::Path>(path), static_cast<ar::Type>(type), norm != 0, {}};
    ar::Memory &memory = work.call.memory;
    for (int r = 0; r < ranks; ++r) {
        memory.ranks.signals[r] = reinterpret_cast<ar::Signal *>(signals[r]);
        memory.data[r] = data[r];
    }
    memory.ranks.timeout_ns = timeout_ns;
    memory.ranks.rank = rank;
    memory.ranks.size = ranks;
    memory.ranks.blocks = blocks;
    memory.multicast = multicast;
    memory.replica = replica;
    memory.half_bytes = half_bytes;
    memory.host_word = host_word;
    work.call.in = in;
    work.call.out = out;
    work.call.residual = residual;
    work.call.weight = weight;
    work.call.total = total;
    work.call.packs = packs;
    work.call.rows = norm ? rows : (packs + ar::kThreads - 1) / ar::kThreads;
    work.call.width = norm ? width : ar::kThreads;
    work.call.eps = eps;
    work.call.unit_offset = unit_offset != 0;
    queues[rank].push_back(work);
}

// Until every queue is empty.
void run() {
    std::vector<std::unique_ptr<Kernel>> kernels(queues.size());
    for (unsigned round = 0;; ++round) {
        bool busy = false;
        for (size_t rank = 0; rank < queues.size(); ++rank) {
            if (kernels[rank] == nullptr && !queues[rank].empty())
                kernels[rank] = start(queues[rank].front());
            if (kernels[rank] == nullptr) continue;
            busy = true;
            turn(*kernels[rank], round + rank * 5);
            if (kernels[rank]->left == 0) {
                kernels[rank].reset();
                queues[rank].pop_front();
            }
        }
        if (!busy) return;
    }
}
}
