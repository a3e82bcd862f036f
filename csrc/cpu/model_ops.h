// Shared by the files of the module model_ops: tensors as addresses, and the ops of other files.

#pragma once

#include <cstdint>

#include "vec.h"

using Address = std::uintptr_t;
using Index = std::int64_t;

template <class T>
T *at(Address address) {
    return reinterpret_cast<T *>(address);
}

// Calls f(T{}) with the type that the tensors have.
template <class F>
void with_type(bool is_bf16, F f) {
    if (is_bf16)
        f(bf16{});
    else
        f(float{});
}

// May lie past the end of the array: nothing is read.
template <class T>
void prefetch(const T *base, Index offset) {
    const Address address = reinterpret_cast<Address>(base) + Address(offset * Index(sizeof(T)));
    __builtin_prefetch(reinterpret_cast<const void *>(address));
}

void linear_panels(Address x, Index x_stride, Address panels, Address bias, Address y, Index m,
                   Index n, Index k, bool wide_output, int threads);

// Raises ValueError for a head size that is not built.
void decode(Address q, Index q_stride, Address k_pool, Address v_pool, Address page_table,
            Index table_stride, Address rows, Address lengths, Address out, Address lse,
            Index sequences, Index width, Index q_heads, Index kv_heads, Index head_dim,
            Index page_size, float scale, Index window, float softcap, bool is_bf16,
            int threads);
