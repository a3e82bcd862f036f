// Python's view of the all-reduce: integers for pointers and streams, no torch header.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/all_reduce.h"

namespace py = pybind11;
using namespace minisgl::all_reduce;

namespace {

void require(bool holds, const std::string &what) {
    if (!holds) throw py::value_error(what);
}

void require_aligned(const char *name, uintptr_t pointer) {
    require(pointer != 0 && pointer % kPackBytes == 0,
            std::string(name) + " must be a 16-byte aligned address, got " +
                std::to_string(pointer));
}

Path to_path(int path) {
    require(0 <= path && path <= 2, "path must be 0, 1 or 2, got " + std::to_string(path));
    return static_cast<Path>(path);
}

Type to_type(int type) {
    require(0 <= type && type <= 2, "type must be 0, 1 or 2, got " + std::to_string(type));
    return static_cast<Type>(type);
}

char *to_bytes(uintptr_t address) { return reinterpret_cast<char *>(address); }

// One rank of an all-reduce. Owns nothing: whoever made the memory keeps it.
class Rank {
  public:
    Rank(int rank, const std::vector<uintptr_t> &signals, const std::vector<uintptr_t> &data,
         uintptr_t multicast, uintptr_t replica, int64_t half_bytes, uintptr_t host_word,
         int blocks, double timeout) {
        const int size = static_cast<int>(signals.size());
        require(2 <= size && size <= kMaxRanks,
                "ranks must be 2 to " + std::to_string(kMaxRanks) + ", got " +
                    std::to_string(size));
        require(static_cast<int>(data.size()) == size, "as many data addresses as signals");
        require(0 <= rank && rank < size, "rank must be below " + std::to_string(size) + ", got " +
                                              std::to_string(rank));
        require(1 <= blocks && blocks <= kMaxBlocks,
                "blocks must be 1 to " + std::to_string(kMaxBlocks) + ", got " +
                    std::to_string(blocks));
        require(half_bytes > 0 && half_bytes % kPackBytes == 0,
                "half_bytes must be a positive multiple of 16, got " + std::to_string(half_bytes));
        require(timeout > 0, "timeout must be greater than 0, got " + std::to_string(timeout));
        require((multicast == 0) == (replica == 0), "multicast and replica go together");
        require(host_word != 0, "host_word must be an address");
        Ranks &ranks = memory_.ranks;
        for (int r = 0; r < size; ++r) {
            require_aligned("signals", signals[r]);
            require_aligned("data", data[r]);
            ranks.signals[r] = reinterpret_cast<Signal *>(signals[r]);
            memory_.data[r] = to_bytes(data[r]);
        }
        ranks.rank = rank;
        ranks.size = size;
        ranks.blocks = blocks;
        ranks.timeout_ns = static_cast<uint64_t>(timeout * 1e9);
        memory_.multicast = to_bytes(multicast);
        memory_.replica = to_bytes(replica);
        memory_.half_bytes = half_bytes;
        memory_.host_word = reinterpret_cast<uint32_t *>(host_word);
    }

    void all_reduce(int path, int type, uintptr_t in, uintptr_t out, int64_t bytes,
                    uintptr_t stream) const {
        require_aligned("in", in);
        require_aligned("out", out);
        Call call = begin(bytes);
        call.in = to_bytes(in);
        call.out = to_bytes(out);
        call.width = kThreads;
        call.rows = (call.packs + kThreads - 1) / kThreads;
        enqueue(to_path(path), to_type(type), false, call, stream);
    }

    void all_reduce_norm(int path, int type, uintptr_t in, uintptr_t residual, uintptr_t weight,
                         uintptr_t out, uintptr_t total, int64_t rows, int64_t row_bytes,
                         float eps, bool unit_offset, uintptr_t stream) const {
        require_aligned("in", in);
        require_aligned("residual", residual);
        require_aligned("weight", weight);
        require_aligned("out", out);
        require_aligned("total", total);
        require(0 < row_bytes && row_bytes <= kMaxRowBytes && row_bytes % kPackBytes == 0,
                "a row must have 16 to " + std::to_string(kMaxRowBytes) +
                    " bytes, a multiple of 16, got " + std::to_string(row_bytes));
        Call call = begin(rows * row_bytes);
        call.in = to_bytes(in);
        call.residual = to_bytes(residual);
        call.weight = to_bytes(weight);
        call.out = to_bytes(out);
        call.total = to_bytes(total);
        call.rows = rows;
        call.width = row_bytes / kPackBytes;
        call.eps = eps;
        call.unit_offset = unit_offset;
        enqueue(to_path(path), to_type(type), true, call, stream);
    }

  private:
    Call begin(int64_t bytes) const {
        require(0 < bytes && bytes <= memory_.half_bytes && bytes % kPackBytes == 0,
                "a call takes 16 to " + std::to_string(memory_.half_bytes) +
                    " bytes, a multiple of 16, got " + std::to_string(bytes));
        Call call{};
        call.memory = memory_;
        call.packs = bytes / kPackBytes;
        return call;
    }

    void enqueue(Path path, Type type, bool norm, const Call &call, uintptr_t stream) const {
        require(path != Path::multimem || memory_.multicast != nullptr,
                "path multimem needs a multicast address");
        const int error = launch(path, type, norm, call, reinterpret_cast<void *>(stream));
        if (error != cudaSuccess)
            throw std::runtime_error(std::string("all-reduce kernel: ") +
                                     cudaGetErrorString(static_cast<cudaError_t>(error)));
    }

    Memory memory_{};
};

}  // namespace

PYBIND11_MODULE(all_reduce, m) {
    m.attr("MAX_RANKS") = kMaxRanks;
    m.attr("MAX_BLOCKS") = kMaxBlocks;
    m.attr("MAX_ROW_BYTES") = kMaxRowBytes;
    m.attr("SIGNAL_BYTES") = sizeof(Signal);
    py::class_<Rank>(m, "Rank")
        .def(py::init<int, const std::vector<uintptr_t> &, const std::vector<uintptr_t> &,
                      uintptr_t, uintptr_t, int64_t, uintptr_t, int, double>(),
             py::arg("rank"), py::arg("signals"), py::arg("data"), py::arg("multicast"),
             py::arg("replica"), py::arg("half_bytes"), py::arg("host_word"), py::arg("blocks"),
             py::arg("timeout"))
        .def("all_reduce", &Rank::all_reduce, py::arg("path"), py::arg("type"), py::arg("input"),
             py::arg("out"), py::arg("num_bytes"), py::arg("stream"))
        .def("all_reduce_norm", &Rank::all_reduce_norm, py::arg("path"), py::arg("type"),
             py::arg("input"), py::arg("residual"), py::arg("weight"), py::arg("out"),
             py::arg("total"), py::arg("rows"), py::arg("row_bytes"), py::arg("eps"),
             py::arg("unit_offset"), py::arg("stream"));
}
