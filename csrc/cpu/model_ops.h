// The ops of the module model_ops, and what their files share: tensors as addresses.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>

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

// Calls f with the head size as a constant. Raises ValueError for one that is not built.
template <class F>
void with_head_dim(Index head_dim, F f) {
    switch (head_dim) {
        case 16: return f(std::integral_constant<int, 16>{});
        case 32: return f(std::integral_constant<int, 32>{});
        case 64: return f(std::integral_constant<int, 64>{});
        case 80: return f(std::integral_constant<int, 80>{});
        case 96: return f(std::integral_constant<int, 96>{});
        case 128: return f(std::integral_constant<int, 128>{});
        case 256: return f(std::integral_constant<int, 256>{});
        default:
            throw pybind11::value_error("head_dim " + std::to_string(head_dim) + " is not built");
    }
}

// The ops, each in the file of its name, or of what it is about.

void linear(Address x, Index x_stride, Address w, Address bias, Address y, Index m, Index n,
            Index k, bool is_bf16, bool wide_output, int threads);

void linear_panels(Address x, Index x_stride, Address panels, Address bias, Address y, Index m,
                   Index n, Index k, bool wide_output, int threads);

// w of `bits` a code in panels, scales and minimums fp16 or fp32, minimums null where they follow from
// scales. x_codes [m, k] int8, x_scales and x_sums fp32 [m, k / 32] are for its own use; null where x
// is not to be rounded.
void grouped_linear(Address x, Index x_stride, Address codes, Address scales, Address minimums,
                    Address bias, Address x_codes, Address x_scales, Address x_sums, Address y,
                    Index m, Index n, Index k, Index group, int bits, bool is_half, bool is_bf16,
                    bool wide_output, int threads);

// weights [groups, size], size a multiple of 16; codes uint8 of the same shape, scales and minimums fp32
// [groups]: infinite where weights are not finite, or too large.
void round_to_codes(Address weights, Address codes, Address scales, Address minimums, Index groups,
                    Index size, int bits, bool is_bf16, int threads);

// Raises IndexError for an id outside [0, num_rows).
void embed_grouped(Address ids, Address codes, Address scales, Address minimums, Address out,
                   Index tokens, Index num_rows, Index k, Index group, int bits, bool is_half,
                   bool is_bf16);

void prepare_inputs(Address input_ids, Address positions, Address slot_mapping, Address seq_lens,
                    Address token_ids, Address sequences, Address offsets, Address rows,
                    Address starts, Address num_tokens, Address last, Address lengths,
                    Address page_table, Index tokens, Index count, Index table_width,
                    Index page_size);

// ids and previous null where rows do not keep the token before their last one.
void accept_and_advance(Address tokens, Address first, Address rows, Address drafts,
                        Address positions, Address last, Address lengths, Address counts,
                        Address counted, Address ids, Address previous, Address accepted,
                        Index num_tokens, Index sequences, Index num_drafts, Index vocab);

// Of `width` tokens each: point_rows and next [sequences * width], drafts [sequences, width - 1], before
// [sequences * width, width - 1].
void prepare_points(Address ids, Address positions, Address rows, Address num_tokens,
                    Address point_rows, Address next, Address drafts, Address before,
                    Index sequences, Index width);

// asked [1 + num_drafts, size], drafted [size, num_drafts]; token_ids [size, width], others [size].
void prepare_proposals(Address asked, Address drafted, Address nth, Address last, Address previous,
                       Address lengths, Address token_ids, Address starts, Address num_tokens,
                       Address positions, Index size, Index num_drafts, Index width);

void keep_proposals(Address tokens, Address drafted, Address nth, Index size, Index num_drafts);

// Both raise IndexError for an id outside [0, num_rows).
void embed_dense(Address ids, Address weight, Address out, Index tokens, Index num_rows,
                 Index row_bytes);

void embed_panels(Address ids, Address panels, Address out, Index tokens, Index num_rows,
                  Index k);

// Of a rank that has the rows of `count` ids from `first` on: an id's number among them, 0 for others.
void local_ids(Address ids, Address out, Index tokens, Index first, Index count);

// Rows [tokens, n] of such ids in place: times scale; zeros for ids of other ranks.
void finish_rows(Address ids, Address rows, Index tokens, Index n, Index first, Index count,
                 float scale, bool is_bf16, int threads);

void rmsnorm(Address x, Index x_stride, Address weight, Address residual, Index residual_stride,
             Address y, Address total, Index rows, Index n, float eps, bool unit_offset, bool is_bf16,
             int threads);

void gated(Address x, Index x_stride, Address y, Index rows, Index n, bool gelu, bool is_bf16,
           int threads);

// logits [tokens, experts]; weights fp32 and ids int32 [tokens, top_k].
void moe_route(Address logits, Index stride, Address weights, Address ids, Index tokens,
               Index experts, Index top_k, bool renormalize, bool is_bf16, int threads);

// Of all experts, in panels: values of bf16 and 0 where there are 16 bits; else codes, scales, minimums as
// in grouped_linear. Group, bits, whether scales are fp16, whether inputs are rounded.
using ExpertsWeight = std::tuple<Address, Address, Address, Index, int, bool, bool>;
// Codes int8 [tokens * top_k, the most inputs], scales and sums fp32, one for 32 codes; null where nothing
// is rounded.
using RoundedRows = std::tuple<Address, Address, Address>;

// gate_up of [experts, 2, inner, hidden]. middle [tokens * top_k, inner], parts [tokens * top_k, hidden]
// and `rounded` are for its own use; an id outside [0, experts) adds nothing.
void moe_experts(Address x, Index x_stride, ExpertsWeight gate_up, ExpertsWeight down, Address weights,
                 Address ids, RoundedRows rounded, Address middle, Address parts, Address out,
                 Index tokens, Index experts, Index top_k, Index hidden, Index inner, bool gelu,
                 bool is_bf16, int threads);

void qkv_prepare(Address qkv, Address positions, Address cos_sin, Address k_pool, Address v_pool,
                 Address slots, Address q_weight, Address k_weight, Address q, Index tokens,
                 Index q_heads, Index kv_heads, Index head_dim, Index rotary_dim, float eps,
                 bool unit_offset, bool interleaved, bool is_bf16, int threads);

// bf16 only. Both raise ValueError for a head size that is not built.
void attention(Address q, Index q_stride, Address k_pool, Address v_pool, Address page_table,
               Index table_stride, Address rows, Address lengths, Address offsets, Address out,
               Address lse, Index sequences, Index q_heads, Index kv_heads, Index head_dim,
               Index page_size, float scale, Index window, float softcap, int threads);

// groups [num_groups, 3] and shared [sequences] int32 as minisgl.kernels.cascade has them, or null.
void decode(Address q, Index q_stride, Address k_pool, Address v_pool, Address page_table,
            Index table_stride, Address rows, Address lengths, Address groups, Address shared,
            Address out, Address lse, Index sequences, Index num_groups, Index width,
            Index q_heads, Index kv_heads, Index head_dim, Index page_size, float scale,
            Index window, float softcap, bool is_bf16, int threads);

// logits [count, vocab] fp32, drafts [count, num_drafts], others as minisgl.kernels.sampling has them.
void adjust_logits(Address logits, Address rows, Address positions, Address params,
                   Address bias_ids, Address bias_values, Address counts, Address drafts,
                   Index count, Index vocab, Index max_biases, Index num_drafts, int threads);

// In place: softcap * tanh(x / softcap).
void cap_logits(Address logits, Index count, Index vocab, float softcap, int threads);

// indices [count] int32 of rows of logits; bits [count, vocab / 32 rounded up].
void mask_logits(Address logits, Address indices, Address bits, Index count, Index vocab,
                 int threads);

// logits [count, vocab] fp32, rows [count] int32 of params, positions [count] int64, out [count] int32.
void sample(Address logits, Index count, Index vocab, Address rows, Address positions,
            Address params, Address out, int threads);
