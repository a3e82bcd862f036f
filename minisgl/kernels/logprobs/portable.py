"""Log-probabilities in Triton: one read of the logits, no sort.

A program reduces a piece of a row to its largest value, its sum of exponentials and its own most
likely tokens; a second, small kernel merges a row's pieces (the online softmax of Milakov and
Gimelshein, 2018, over pieces).
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.logprobs import MAX_TOP

BLOCK = 4096  # logits of a piece, held in registers while its largest are taken out one by one


@triton.jit
def take_largest(x, ids, left, NONE: tl.constexpr):
    """The largest x that is left, the lowest of its ids (NONE: nothing is), what is left then."""
    best = tl.max(tl.where(left, x, float("-inf")), 0)
    taken = tl.min(tl.where(left & (x == best), ids, NONE), 0)
    return best, taken, left & (ids != taken)


@triton.jit(do_not_specialize=["num_top"])
def piece_kernel(
    logits_ptr,  # [P, V]
    stats_ptr,  # [P, PIECES, 2] fp32: the largest, and the sum of exponentials below it
    values_ptr,  # [P, PIECES, MAX_TOP] fp32
    ids_ptr,  # [P, PIECES, MAX_TOP] int32, V: none
    stride,
    num_top,
    V: tl.constexpr,
    PIECES: tl.constexpr,
    MAX_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = piece * BLOCK + tl.arange(0, BLOCK)
    left = ids < V
    x = tl.load(logits_ptr + row * stride + ids, mask=left, other=float("-inf"))
    top = tl.max(x, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    at = row * PIECES + piece
    tl.store(stats_ptr + at * 2, top)
    tl.store(stats_ptr + at * 2 + 1, tl.sum(tl.exp(x - base), 0))
    for j in range(num_top):
        best, taken, left = take_largest(x, ids, left, V)
        tl.store(values_ptr + at * MAX_TOP + j, best)
        tl.store(ids_ptr + at * MAX_TOP + j, taken)


@triton.jit(
    do_not_specialize=["num_top", "stride"], do_not_specialize_on_alignment=["token_ids_ptr"]
)
def merge_pieces_kernel(
    logits_ptr,
    token_ids_ptr,
    stats_ptr,
    values_ptr,
    ids_ptr,
    chosen_ptr,  # [P]
    top_ids_ptr,  # [P, num_top]
    top_ptr,  # [P, num_top]
    stride,
    num_top,
    V: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    MAX_TOP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, BLOCK_PIECES)
    there = piece < PIECES
    stats = stats_ptr + (row * PIECES + piece) * 2
    tops = tl.load(stats, mask=there, other=float("-inf"))
    sums = tl.load(stats + 1, mask=there, other=0.0)
    top = tl.max(tops, 0)
    total = top + tl.log(tl.sum(sums * tl.exp(tops - top), 0))
    token = tl.load(token_ids_ptr + row)
    tl.store(chosen_ptr + row, tl.load(logits_ptr + row * stride + token) - total)
    nth = tl.arange(0, BLOCK_PIECES * MAX_TOP)
    left = (nth < PIECES * MAX_TOP) & (nth % MAX_TOP < num_top)
    first = row * PIECES * MAX_TOP
    x = tl.load(values_ptr + first + nth, mask=left, other=float("-inf"))
    ids = tl.load(ids_ptr + first + nth, mask=left, other=V)
    left &= ids < V
    for j in range(num_top):
        best, taken, left = take_largest(x, ids, left, V)
        tl.store(top_ids_ptr + row * num_top + j, taken)
        tl.store(top_ptr + row * num_top + j, best - total)


def logprobs_portable(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logprobs_reference` on a GPU. Raises ValueError for arguments that do not fit."""
    rows, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be dense float32, got {logits.dtype} {logits.stride()}")
    if token_ids.shape != (rows,):
        raise ValueError(f"token_ids must be [{rows}], got {list(token_ids.shape)}")
    if not 0 <= num_top <= min(vocab, MAX_TOP):
        raise ValueError(f"num_top must be 0 to {min(vocab, MAX_TOP)}, got {num_top}")
    pieces = triton.cdiv(vocab, BLOCK)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    chosen, top = made(rows), made(rows, num_top)
    top_ids = made(rows, num_top, dtype=torch.int32)
    if rows == 0:
        return chosen, top_ids, top
    stats, values = made(rows, pieces, 2), made(rows, pieces, MAX_TOP)
    ids = made(rows, pieces, MAX_TOP, dtype=torch.int32)
    stride = logits.stride(0)
    piece_kernel[(rows, pieces)](
        logits, stats, values, ids, stride, num_top,
        V=vocab, PIECES=pieces, MAX_TOP=MAX_TOP, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    merge_pieces_kernel[(rows,)](
        logits, token_ids, stats, values, ids, chosen, top_ids, top, stride, num_top,
        V=vocab, PIECES=pieces, BLOCK_PIECES=triton.next_power_of_2(pieces), MAX_TOP=MAX_TOP,
        num_warps=8,
    )  # fmt: skip
    return chosen, top_ids, top
