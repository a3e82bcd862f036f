"""Chunk attention on CPU: native in bf16, else fp32 matrix products of blocks of queries.

A sequence whose pages lie in order is read through a view of the pool; only scattered pages are
gathered. A block of queries reads only the keys that it may see, so causal and windowed chunks
skip the rest, and the score matrix stays small.
"""

import math

import torch

from minisgl.device.tape import by_call
from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.config import batch_invariant
from minisgl.kernels.decode.native import attention_ops, decode_native
from minisgl.kernels.native import address

BLOCK = 128  # queries at a time


def attention_cpu(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """See `attention_reference`. Under `fixed_order` a query is computed as if it came alone.

    Raises RuntimeError under `fixed_order` where the native ops are missing or do not cover it.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32) if return_lse else None
    if not batch_invariant() and _native(q, kv, cu_seqlens_q, out, lse):
        return out if lse is None else (out, lse)
    _sequence_by_sequence(q, kv, cu_seqlens_q, out, lse)
    return out if lse is None else (out, lse)


@by_call
def _sequence_by_sequence(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    offsets = cu_seqlens_q.tolist()
    one_sequence = _each_query_alone if batch_invariant() else _blocks_of_queries
    for s in range(len(kv.rows)):
        own = slice(offsets[s], offsets[s + 1])
        if own.start < own.stop:
            one = kv._replace(rows=kv.rows[s : s + 1], seq_lens=kv.seq_lens[s : s + 1])
            one_sequence(q[own], one, out[own], None if lse is None else lse[own])


def _native(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> bool:
    """Whether the native op is built and covers the call; then it has been computed."""
    _, num_heads, head_dim = q.shape
    native = attention_ops(q, kv, out)
    if native is None or q.dtype != torch.bfloat16:
        return False
    native.attention(
        q.data_ptr(),
        q.stride(0),
        kv.k_pool.data_ptr(),
        kv.v_pool.data_ptr(),
        kv.page_table.data_ptr(),
        kv.page_table.stride(0),
        kv.rows.data_ptr(),
        kv.seq_lens.data_ptr(),
        cu_seqlens_q.data_ptr(),
        out.data_ptr(),
        address(lse),
        kv.seq_lens.shape[0],
        num_heads,
        kv.k_pool.shape[1],
        head_dim,
        kv.page_size,
        kv.scale,
        kv.window or 0,
        kv.softcap or 0.0,
        torch.get_num_threads(),
    )
    return True


def _each_query_alone(
    q: torch.Tensor, kv: PagedKV, out: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """One sequence. q, out: [n, Hq, D]."""
    result = decode_native(q, kv, width=len(q), return_lse=lse is not None, out=out)
    if result is None:
        raise RuntimeError("attention in a fixed order on CPU needs the native ops")
    if lse is not None:
        lse.copy_(result[1])


def _blocks_of_queries(
    q: torch.Tensor, kv: PagedKV, out: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """One sequence. q, out: [n, Hq, D]."""
    row, length = int(kv.rows), int(kv.seq_lens)
    past = length - len(q)  # position of the first query
    first = 0 if kv.window is None else max(past - kv.window + 1, 0)
    slots = sequence_slots(kv.page_table[row], first, length, kv.page_size)
    keys, values = kv.k_pool[slots], kv.v_pool[slots]
    for start in range(0, len(q), BLOCK):
        block = slice(start, min(start + BLOCK, len(q)))
        position = past + block.start
        low = 0 if kv.window is None else max(position - kv.window + 1, 0)
        seen = slice(low - first, max(past + block.stop - first, 0))
        attend(
            q[block],
            keys[seen],
            values[seen],
            out[block],
            None if lse is None else lse[block],
            first_position=position - low,
            scale=kv.scale,
            window=kv.window,
            softcap=kv.softcap,
        )


def sequence_slots(
    pages: torch.Tensor, first: int, length: int, page_size: int
) -> slice | torch.Tensor:
    """Slots of keys first <= j < length: a slice where their pages are consecutive."""
    if length <= first:
        return slice(0, 0)
    own = pages[first // page_size : (length - 1) // page_size + 1].long()
    offset = first % page_size
    count = length - first
    if own.numel() == 1 or bool((own.diff() == 1).all()):
        start = int(own[0]) * page_size + offset
        return slice(start, start + count)
    slots = own[:, None] * page_size + torch.arange(page_size)
    return slots.flatten()[offset : offset + count]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    first_position: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """q, out: [n, Hq, D]; k, v: [L, Hkv, D]; query t stands at first_position + t among the keys.

    first_position is negative where queries outnumber keys.
    """
    n, num_heads, head_dim = q.shape
    length, kv_heads, _ = k.shape
    if length == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return
    grouped = q.unflatten(1, (kv_heads, num_heads // kv_heads)).permute(1, 2, 0, 3)
    rows = (grouped.float() * scale).reshape(kv_heads, -1, head_dim)  # [Hkv, G * n, D]
    scores = torch.bmm(rows, k.permute(1, 2, 0).float())
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(kv_heads, -1, n, length)
    if first_position < length - 1 or window is not None:
        i = first_position + torch.arange(n)[:, None]
        j = torch.arange(length)
        hidden = j > i if window is None else (j > i) | (i - j >= window)
        scores.masked_fill_(hidden, -math.inf)
    if lse is not None:
        lse.view(n, kv_heads, -1).copy_(torch.logsumexp(scores, dim=-1).permute(2, 0, 1))
    weights = torch.softmax(scores, dim=-1)
    if first_position < 0:
        weights.nan_to_num_(0.0)  # a query that sees no key
    result = torch.bmm(weights.view(kv_heads, -1, length), v.permute(1, 0, 2).float())
    heads = result.view(kv_heads, -1, n, head_dim).permute(2, 0, 1, 3)
    out.view(n, kv_heads, -1, head_dim).copy_(heads)
