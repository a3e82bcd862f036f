"""A step's inputs from the rows, and the rows updated by its tokens: one launch each."""

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit(
    do_not_specialize=["tokens", "sequences"],
    do_not_specialize_on_alignment=[
        "token_ids_ptr",
        "sequences_ptr",
        "offsets_ptr",
        "rows_ptr",
        "starts_ptr",
        "num_tokens_ptr",
    ],
)
def prepare_kernel(
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    token_ids_ptr,
    sequences_ptr,
    offsets_ptr,
    rows_ptr,
    starts_ptr,
    num_tokens_ptr,
    last_ptr,
    lengths_ptr,
    table_ptr,
    tokens,
    sequences,
    table_stride,
    max_pages,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < tokens
    s = tl.load(sequences_ptr + i, mask=ok, other=0)
    row = tl.load(rows_ptr + s, mask=ok, other=0).to(tl.int64)
    start = tl.load(starts_ptr + s, mask=ok, other=0)
    length = tl.load(lengths_ptr + row, mask=ok, other=0)
    index = i - tl.load(offsets_ptr + s, mask=ok, other=0)
    position = tl.where(start < 0, length, start) + index
    token = tl.load(token_ids_ptr + i, mask=ok, other=0)
    last = tl.load(last_ptr + row, mask=ok, other=0)
    tl.store(input_ids_ptr + i, tl.where(token < 0, last, token), mask=ok)
    tl.store(positions_ptr + i, position.to(tl.int64), mask=ok)
    page_index = tl.minimum(position // PAGE, max_pages - 1)
    page = tl.load(table_ptr + row * table_stride + page_index, mask=ok, other=0)
    slot = page.to(tl.int64) * PAGE + position % PAGE
    own = index < tl.load(num_tokens_ptr + s, mask=ok, other=0)
    tl.store(slots_ptr + i, tl.where(own, slot, -1), mask=ok)

    ok = i < sequences
    row = tl.load(rows_ptr + i, mask=ok, other=0).to(tl.int64)
    start = tl.load(starts_ptr + i, mask=ok, other=0)
    length = tl.load(lengths_ptr + row, mask=ok, other=0)
    width = tl.load(offsets_ptr + i + 1, mask=ok, other=0)
    width -= tl.load(offsets_ptr + i, mask=ok, other=0)
    reach = tl.where(start < 0, length, start) + width
    live = tl.load(num_tokens_ptr + i, mask=ok, other=0) > 0
    tl.store(seq_lens_ptr + i, tl.where(live, reach, 0), mask=ok)


@triton.jit(do_not_specialize_on_alignment=["first_ptr", "rows_ptr", "drafts_ptr"])
def advance_kernel(
    tokens_ptr,
    first_ptr,
    rows_ptr,
    drafts_ptr,  # [M, K]
    positions_ptr,
    last_ptr,
    lengths_ptr,
    counts_ptr,  # [R, V]
    counted_ptr,
    accepted_ptr,
    counts_stride,
    K: tl.constexpr,
):
    m = tl.program_id(0)
    row = tl.load(rows_ptr + m).to(tl.int64)
    at = tl.load(first_ptr + m)
    counted = tl.load(counted_ptr + row) != 0
    token = tl.load(tokens_ptr + at)
    tl.atomic_add(counts_ptr + row * counts_stride + token, 1, mask=counted)
    accepted = 0
    going = token >= 0
    for j in range(K):
        draft = tl.load(drafts_ptr + m * K + j)
        going = going & (draft >= 0) & (draft == token)
        if going:
            accepted += 1
            token = tl.load(tokens_ptr + at + accepted)
            tl.atomic_add(counts_ptr + row * counts_stride + token, 1, mask=counted)
    tl.store(last_ptr + row, token)
    tl.store(lengths_ptr + row, tl.load(positions_ptr + at + accepted).to(tl.int32))
    tl.store(accepted_ptr + m, accepted)


def prepare_inputs_portable(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    seq_lens: torch.Tensor,
    token_ids: torch.Tensor,
    sequences: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    num_tokens: torch.Tensor,
    last: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
) -> None:
    """`prepare_inputs_reference` on a GPU."""
    tokens, count = len(input_ids), len(seq_lens)
    if len(offsets) != count + 1:
        raise ValueError(f"offsets must be [{count + 1}], got {list(offsets.shape)}")
    if max(tokens, count) == 0:
        return
    prepare_kernel[(triton.cdiv(max(tokens, count), BLOCK),)](
        input_ids,
        positions,
        slot_mapping,
        seq_lens,
        token_ids,
        sequences,
        offsets,
        rows,
        starts,
        num_tokens,
        last,
        lengths,
        page_table,
        tokens,
        count,
        page_table.stride(0),
        page_table.shape[1],
        PAGE=page_size,
        BLOCK=BLOCK,
        num_warps=4,
    )


def accept_and_advance_portable(
    tokens: torch.Tensor,
    first: torch.Tensor,
    rows: torch.Tensor,
    drafts: torch.Tensor,
    positions: torch.Tensor,
    last: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    counted: torch.Tensor,
    ids: torch.Tensor | None = None,
    previous: torch.Tensor | None = None,
) -> torch.Tensor:
    """`accept_and_advance_reference` on a GPU."""
    count, width = drafts.shape
    if len(rows) != count or len(first) != count or not drafts.is_contiguous():
        raise ValueError(
            f"rows and first must be [{count}] and drafts dense [{count}, K], got "
            f"{list(rows.shape)}, {list(first.shape)} and {list(drafts.shape)}"
        )
    accepted = torch.empty(count, dtype=torch.int32, device=tokens.device)
    if count:
        advance_kernel[(count,)](
            tokens,
            first,
            rows,
            drafts if drafts.numel() else rows,
            positions,
            last,
            lengths,
            counts,
            counted,
            accepted,
            counts.stride(0),
            K=width,
            num_warps=1,
        )
    if ids is not None and previous is not None:
        previous.index_copy_(0, rows.long(), ids.index_select(0, first + accepted))
    return accepted
