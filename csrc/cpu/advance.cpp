// The state of rows: a step's inputs and points from it, a draft model's too, and it moved on by what was
// sampled.

#include <algorithm>

#include "model_ops.h"

void prepare_inputs(Address input_ids, Address positions, Address slot_mapping, Address seq_lens,
                    Address token_ids, Address sequences, Address offsets, Address rows,
                    Address starts, Address num_tokens, Address last, Address lengths,
                    Address page_table, Index tokens, Index count, Index table_width,
                    Index page_size) {
    using Int = std::int32_t;
    const auto *offset = at<const Int>(offsets), *row = at<const Int>(rows);
    const auto *start = at<const Int>(starts), *own = at<const Int>(num_tokens);
    const auto begin = [&](Index s) {
        return Index(start[s] < 0 ? at<const Int>(lengths)[row[s]] : start[s]);
    };
    for (Index t = 0; t < tokens; ++t) {
        const Index s = at<const Int>(sequences)[t], index = t - offset[s];
        const Index position = begin(s) + index;
        const Index page = std::min(position / page_size, table_width - 1);
        const Int id = at<const Int>(token_ids)[t];
        at<Int>(input_ids)[t] = id < 0 ? at<const Int>(last)[row[s]] : id;
        at<Index>(positions)[t] = position;
        const Index first = at<const Int>(page_table)[row[s] * table_width + page] * page_size;
        at<Index>(slot_mapping)[t] = index < own[s] ? first + position % page_size : -1;
    }
    for (Index s = 0; s < count; ++s)
        at<Int>(seq_lens)[s] = own[s] > 0 ? Int(begin(s)) + offset[s + 1] - offset[s] : 0;
}

void accept_and_advance(Address tokens, Address first, Address rows, Address drafts,
                        Address positions, Address last, Address lengths, Address counts,
                        Address counted, Address ids, Address previous, Address accepted,
                        Index num_tokens, Index sequences, Index num_drafts, Index vocab) {
    using Int = std::int32_t;
    const auto *token = at<const Int>(tokens);
    for (Index m = 0; m < sequences; ++m) {
        const Index begin = at<const Int>(first)[m], row = at<const Int>(rows)[m];
        const Int *drafted = at<const Int>(drafts) + m * num_drafts;
        Index right = 0;
        while (right < num_drafts && drafted[right] >= 0 &&
               token[std::min(begin + right, num_tokens - 1)] == drafted[right])
            ++right;
        at<Int>(accepted)[m] = Int(right);
        at<Int>(last)[row] = token[begin + right];
        if (previous) at<Int>(previous)[row] = at<const Int>(ids)[begin + right];
        at<Int>(lengths)[row] = Int(at<const Index>(positions)[begin + right]);
        if (at<const Int>(counted)[row])
            for (Index i = begin; i <= begin + right; ++i)
                ++at<Int>(counts)[row * vocab + token[i]];
    }
}

void prepare_points(Address ids, Address positions, Address rows, Address num_tokens,
                    Address point_rows, Address next, Address drafts, Address before,
                    Index sequences, Index width) {
    using Int = std::int32_t;
    for (Index m = 0; m < sequences; ++m) {
        Int *drafted = at<Int>(drafts) + m * (width - 1);
        for (Index j = 0; j + 1 < width; ++j)
            drafted[j] = j + 1 < at<const Int>(num_tokens)[m] ? at<const Int>(ids)[m * width + j + 1] : -1;
        for (Index i = 0; i < width; ++i) {
            const Index n = m * width + i;
            at<Int>(point_rows)[n] = at<const Int>(rows)[m];
            at<Index>(next)[n] = at<const Index>(positions)[n] + 1;
            Int *earlier = at<Int>(before) + n * (width - 1);
            std::copy_n(drafted, i, earlier);
            std::fill_n(earlier + i, width - 1 - i, -1);
        }
    }
}

void prepare_proposals(Address asked, Address drafted, Address nth, Address last, Address previous,
                       Address lengths, Address token_ids, Address starts, Address num_tokens,
                       Address positions, Index size, Index num_drafts, Index width) {
    using Int = std::int32_t;
    const Index pass = *at<const Index>(nth);
    for (Index d = 0; d < size; ++d) {
        const Int row = at<const Int>(asked)[d], length = at<const Int>(lengths)[row];
        Int *own = at<Int>(drafted) + d * num_drafts, *ids = at<Int>(token_ids) + d * width;
        if (width > 1) {
            std::fill_n(own, num_drafts, -1);
            ids[0] = at<const Int>(previous)[row];
            ids[1] = at<const Int>(last)[row];
        } else {
            ids[0] = own[pass - 1];
        }
        at<Int>(starts)[d] = width > 1 ? length - 1 : length + Int(pass);
        at<Int>(num_tokens)[d] = at<const Int>(asked)[(1 + pass) * size + d];
        at<Index>(positions)[d] = length + 1 + pass;
    }
}

void keep_proposals(Address tokens, Address drafted, Address nth, Index size, Index num_drafts) {
    using Int = std::int32_t;
    for (Index d = 0; d < size; ++d)
        at<Int>(drafted)[d * num_drafts + *at<const Index>(nth)] = at<const Int>(tokens)[d];
}
