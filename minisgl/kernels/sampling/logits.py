"""What happens to logits before sampling, in place: penalties, biases and grammar masks."""

import torch
import triton
import triton.language as tl

from minisgl.kernels.sampling import PARAM_WORDS, SEEN_IN_PROMPT
from minisgl.kernels.sampling.rows import WORDS, float_word, word_of

BLOCK = 2048
REPETITION, PRESENCE, FREQUENCY = map(
    word_of, ("repetition_penalty", "presence_penalty", "frequency_penalty")
)
MIN_LENGTH, NUM_BANS, NUM_BIASES = map(word_of, ("min_length", "num_bans", "num_biases"))
NEEDS_COUNTS = word_of("needs_counts")
_SEEN = tl.constexpr(SEEN_IN_PROMPT)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "drafts_ptr"])
def penalize_kernel(
    logits_ptr,  # [N, V]
    rows_ptr,
    params_ptr,
    counts_ptr,  # [R, V]
    drafts_ptr,  # [N, K]
    stride,
    counts_stride,
    V: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    row = tl.load(rows_ptr + n).to(tl.int64)
    record = params_ptr + row * WORDS
    if tl.load(record + NEEDS_COUNTS) != 0:
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok = ids < V
        at = logits_ptr + n.to(tl.int64) * stride + ids
        x = tl.load(at, mask=ok, other=0.0)
        held = tl.load(counts_ptr + row * counts_stride + ids, mask=ok, other=0)
        output = (held & (_SEEN - 1)).to(tl.float32)
        for j in tl.static_range(K):  # integers here would be summed through the stack
            output += tl.where(ids == tl.load(drafts_ptr + n * K + j), 1.0, 0.0)
        factor = float_word(record, REPETITION)
        seen = (output > 0.0) | (held >= _SEEN)
        x = tl.where(seen, tl.where(x > 0.0, x / factor, x * factor), x)
        x -= float_word(record, FREQUENCY) * output
        x -= tl.where(output > 0.0, float_word(record, PRESENCE), 0.0)
        tl.store(at, x, mask=ok)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def bias_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    params_ptr,
    bias_ids_ptr,  # [R, A]
    bias_values_ptr,
    stride,
    bias_stride,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    row = tl.load(rows_ptr + n).to(tl.int64)
    record = params_ptr + row * WORDS
    last = tl.load(record + NUM_BIASES)
    banned = tl.load(positions_ptr + n) < tl.load(record + MIN_LENGTH)
    first = tl.where(banned, 0, tl.load(record + NUM_BANS))
    for start in range(0, last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        active = (entry >= first) & (entry < last)
        at = row * bias_stride + entry
        ids = tl.load(bias_ids_ptr + at, mask=active, other=0)
        values = tl.load(bias_values_ptr + at, mask=active, other=0.0)
        tl.atomic_add(logits_ptr + n.to(tl.int64) * stride + ids, values, mask=active)


@triton.jit(do_not_specialize_on_alignment=["indices_ptr", "bits_ptr"])
def mask_kernel(
    logits_ptr,
    indices_ptr,
    bits_ptr,
    stride,
    bits_stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0)
    index = tl.load(indices_ptr + m).to(tl.int64)
    if index >= 0:
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok = ids < V
        word = tl.load(bits_ptr + m.to(tl.int64) * bits_stride + ids // 32, mask=ok, other=-1)
        forbidden = ok & (((word >> (ids % 32)) & 1) == 0)
        banned = tl.full([BLOCK], float("-inf"), tl.float32)
        tl.store(logits_ptr + index * stride + ids, banned, mask=forbidden)


def adjust_logits_portable(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    params: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    counts: torch.Tensor,
    drafts: torch.Tensor,
) -> None:
    """`adjust_logits_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    count, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be dense float32, got {logits.dtype} {logits.stride()}")
    if params.shape[1:] != (PARAM_WORDS,) or not params.is_contiguous():
        raise ValueError(f"params must be dense [R, {PARAM_WORDS}], got {list(params.shape)}")
    if counts.shape[1] != vocab or drafts.shape[0] != count or not drafts.is_contiguous():
        raise ValueError(
            f"counts must be [R, {vocab}] and drafts dense [{count}, K], "
            f"got {list(counts.shape)} and {list(drafts.shape)}"
        )
    if bias_ids.stride() != bias_values.stride() or bias_ids.stride(1) != 1:
        raise ValueError("bias_ids and bias_values must be dense and alike")
    if count == 0:
        return
    penalize_kernel[(count, triton.cdiv(vocab, BLOCK))](
        logits,
        rows,
        params,
        counts,
        drafts if drafts.numel() else rows,
        logits.stride(0),
        counts.stride(0),
        V=vocab,
        K=drafts.shape[1],
        BLOCK=BLOCK,
        num_warps=8,
    )
    bias_kernel[(count,)](
        logits,
        rows,
        positions,
        params,
        bias_ids,
        bias_values,
        logits.stride(0),
        bias_ids.stride(0),
        BLOCK=128,
        num_warps=4,
    )


def mask_logits_portable(logits: torch.Tensor, indices: torch.Tensor, bits: torch.Tensor) -> None:
    """`mask_logits_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    vocab = logits.shape[1]
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be dense float32, got {logits.dtype} {logits.stride()}")
    if bits.shape != (len(indices), triton.cdiv(vocab, 32)) or bits.stride(1) != 1:
        raise ValueError(
            f"bits must be [{len(indices)}, {triton.cdiv(vocab, 32)}], got {list(bits.shape)}"
        )
    if len(indices):
        mask_kernel[(len(indices), triton.cdiv(vocab, BLOCK))](
            logits,
            indices,
            bits,
            logits.stride(0),
            bits.stride(0),
            V=vocab,
            BLOCK=BLOCK,
            num_warps=8,
        )
