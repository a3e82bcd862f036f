// The state of rows: a step's inputs from it, and it moved on by what was sampled.

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
                        Address counted, Address accepted, Index num_tokens, Index sequences,
                        Index num_drafts, Index vocab) {
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
        at<Int>(lengths)[row] = Int(at<const Index>(positions)[begin + right]);
        if (at<const Int>(counted)[row])
            for (Index i = begin; i <= begin + right; ++i)
                ++at<Int>(counts)[row * vocab + token[i]];
    }
}
