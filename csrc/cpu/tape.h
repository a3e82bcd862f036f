// A tape: the calls of native ops in the order in which they were made, to be made again without
// Python. While a thread records, every op that is bound with `recorded` adds itself.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <vector>

using Tape = std::vector<std::function<void()>>;

inline thread_local Tape *recording = nullptr;  // of this thread and this module

template <class... Args>
auto recorded(void (*op)(Args...)) {
    return [op](Args... args) {
        op(args...);
        if (recording) recording->push_back([=] { op(args...); });
    };
}

template <class C, class... Args>
auto recorded(void (C::*op)(Args...)) {  // of an object that outlives the tape
    return [op](C &self, Args... args) {
        (self.*op)(args...);
        if (recording) recording->push_back([=, &self] { (self.*op)(args...); });
    };
}

// The address of the tape that this thread's calls of this module's ops are added to; 0 ends it.
inline void bind_recording(pybind11::module_ &m) {
    m.def("record", [](std::uintptr_t tape) { recording = reinterpret_cast<Tape *>(tape); });
}
