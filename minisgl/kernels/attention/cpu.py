"""Chunk attention on CPU: fp32 matrix products per sequence, in blocks of queries.

A sequence whose pages lie in order is read through a view of the pool; only scattered pages are
gathered. A block of queries reads only the keys that it may see, so causal and windowed chunks
skip the rest, and the score matrix stays small.
"""

import math

import torch

from minisgl.kernels.config import batch_invariant
from minisgl.kernels.decode.native import decode_native

_BLOCK = 128  # queries at a time


def attention_cpu(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `attention_reference`. Under `fixed_order` a query is computed as if it came alone.

    Raises RuntimeError under `fixed_order` where the native ops are missing or do not cover it.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32) if return_lse else None
    offsets = cu_seqlens_q.tolist()
    for s, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        start, end = offsets[s], offsets[s + 1]
        if start == end:
            continue
        if batch_invariant():
            own = slice(start, end)
            result = decode_native(
                q[own],
                k_pool,
                v_pool,
                page_table,
                rows[s : s + 1],
                seq_lens[s : s + 1],
                page_size=page_size,
                scale=scale,
                width=end - start,
                window=window,
                softcap=softcap,
                return_lse=return_lse,
                out=out[own],
            )
            if result is None:
                raise RuntimeError("attention in a fixed order on CPU needs the native ops")
            if lse is not None:
                lse[own] = result[1]
            continue
        past = length - (end - start)  # position of the first query
        first = 0 if window is None else max(past - window + 1, 0)
        slots = sequence_slots(page_table[row], first, length, page_size)
        keys, values = k_pool[slots], v_pool[slots]
        for block in range(start, end, _BLOCK):
            stop = min(block + _BLOCK, end)
            position = past + block - start
            hi = past + stop - start
            lo = 0 if window is None else max(position - window + 1, 0)
            attend(
                q[block:stop],
                keys[lo - first : max(hi - first, 0)],
                values[lo - first : max(hi - first, 0)],
                out[block:stop],
                None if lse is None else lse[block:stop],
                first_position=position - lo,
                scale=scale,
                window=window,
                softcap=softcap,
            )
    return out if lse is None else (out, lse)


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
