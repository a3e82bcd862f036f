// The module model_ops: a model's ops on a CPU, in bf16 or fp32 with fp32 arithmetic, and tapes of them.
// The Python twins are the references of minisgl/kernels; the callers there check shapes. Tensors
// come as addresses.

#include "model_ops.h"
#include "pool.h"

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <utility>

#include "tape.h"

namespace py = pybind11;

PYBIND11_MODULE(model_ops, m) {
    m.attr("LEVEL") = LEVEL;
    m.attr("HEAD_DIMS") = py::make_tuple(16, 32, 64, 80, 96, 128, 256);
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
    m.attr("BF16_ARITHMETIC") = true;  // of the CPU, which PyTorch's products then use
#else
    m.attr("BF16_ARITHMETIC") = false;
#endif
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("linear", recorded(&linear), unlocked, "y [m, n] = x [m, k] w [n, k]^T + bias [n]");
    m.def("linear_panels", recorded(&linear_panels), unlocked, "the same with w in panels of 32 rows");
    m.def("grouped_linear", recorded(&grouped_linear), unlocked, "minisgl.kernels.grouped_linear");
    m.def("round_to_codes", &round_to_codes, unlocked, "`quantized` of that room");
    m.def("embed_grouped", recorded(&embed_grouped), unlocked, "rows of such a weight");
    m.def("rmsnorm", recorded(&rmsnorm), unlocked, "minisgl.kernels.rmsnorm on rows");
    m.def("gated", recorded(&gated), unlocked, "minisgl.kernels.activation on rows");
    m.def("moe_route", recorded(&moe_route), unlocked, "minisgl.kernels.moe");
    m.def("moe_experts", recorded(&moe_experts), unlocked, "minisgl.kernels.moe, weights in panels");
    m.def("qkv_prepare", recorded(&qkv_prepare), unlocked, "minisgl.kernels.qkv_prepare");
    m.def("attention", recorded(&attention), unlocked, "minisgl.kernels.attention, in bf16");
    m.def("decode", recorded(&decode), unlocked, "minisgl.kernels.decode, cascade");
    m.def("cap_logits", recorded(&cap_logits), unlocked, "minisgl.kernels.sampling");
    m.def("adjust_logits", recorded(&adjust_logits), unlocked, "minisgl.kernels.sampling");
    m.def("mask_logits", recorded(&mask_logits), unlocked, "minisgl.kernels.sampling");
    m.def("sample", recorded(&sample), unlocked, "minisgl.kernels.sampling");
    m.def("prepare_inputs", recorded(&prepare_inputs), unlocked, "minisgl.kernels.advance");
    m.def("accept_and_advance", recorded(&accept_and_advance), unlocked, "minisgl.kernels.advance");
    m.def("prepare_points", recorded(&prepare_points), unlocked, "minisgl.kernels.advance");
    m.def("prepare_proposals", recorded(&prepare_proposals), unlocked, "minisgl.kernels.propose");
    m.def("keep_proposals", recorded(&keep_proposals), unlocked, "minisgl.kernels.propose");
    m.def("embed_dense", recorded(&embed_dense), unlocked, "minisgl.kernels.embedding");
    m.def("embed_panels", recorded(&embed_panels), unlocked, "rows of a weight in panels");
    m.def("local_ids", recorded(&local_ids), unlocked, "minisgl.kernels.embedding, over ranks");
    m.def("finish_rows", recorded(&finish_rows), unlocked, "minisgl.kernels.embedding, over ranks or scaled");
    py::class_<Tape>(m, "Tape", py::module_local())  // there may be a module for another level
        .def(py::init<>())
        .def("__len__", [](const Tape &tape) { return tape.size(); })
        .def_property_readonly("address", [](Tape &tape) { return Address(&tape); })
        .def("call",
             [](Tape &tape, py::function call) {
                 auto kept = std::make_shared<py::function>(std::move(call));
                 tape.push_back([kept] {
                     py::gil_scoped_acquire held;
                     (*kept)();
                 });
             })
        .def("copy",  // of dense memory
             [](Tape &tape, Address to, Address from, Index bytes) {
                 tape.push_back([=] { std::memmove(at<char>(to), at<const char>(from), bytes); });
             })
        .def("replay",
             [](const Tape &tape, int most_threads) {
                 const FewerThreads until_the_end(most_threads);
                 for (const auto &call : tape) call();
             },
             unlocked);
    bind_recording(m);
}
