"""Flash attention over paged keys: a program takes a tile of one sequence's queries of one group.

The query heads that share a key head are packed into the tile's rows, so keys and values are read
once for all of them. Scores are kept in base 2. The running maximum starts at a finite value: a
row that has seen no key yet then needs no special case, and masked tiles add exactly nothing, so
a query's result does not depend on the tile, chunk or batch it is computed in.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.config import Tile, architecture, attention_tile


@triton.jit
def key_slots(table_row, start, j, live, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slots of keys j = start .. start + BLOCK_N - 1; where not `live` they mean nothing."""
    if PAGE % BLOCK_N == 0:  # the tile lies within one page
        page = tl.load(table_row + start // PAGE).to(tl.int64)
        slots = page * PAGE + start % PAGE + (j - start)
    else:
        page = tl.load(table_row + j // PAGE, mask=live, other=0).to(tl.int64)
        slots = page * PAGE + j % PAGE
    return slots


@triton.jit
def fold(
    q,  # [M, D]
    k,  # [N, D]
    top,  # [M] fp32: largest score so far, base 2
    position,  # [M]: the queries' positions
    j,  # [N]: the keys' positions
    end,
    scale,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(weights [M, N] of a tile's keys, factor [M] for what came before, the new maximum)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:
        # tanh(u) = 1 - 2 / (exp(2u) + 1), right at both infinities
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))
    scores *= LOG2E
    if MASKED:
        visible = (j[None, :] <= position[:, None]) & (j < end)[None, :]
        if WINDOW > 0:
            visible &= j[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    return tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top), new_top


@triton.jit
def attend(
    q,
    acc,  # [M, D] fp32: sum of weights times values
    top,
    total,  # [M] fp32: sum of weights
    position,
    start,
    end,
    keys,  # the pool
    values,
    column,  # where this key head begins in a slot
    table_row,
    scale,
    softcap,
    key_stride,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of online softmax over the keys start .. start + BLOCK_N - 1, below `end`.

    Without MASKED all of them are visible to all queries.
    """
    j = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    live = j < end
    slots = key_slots(table_row, start, j, live, PAGE, BLOCK_N)
    at = slots[:, None] * key_stride + column + d[None, :]
    if MASKED:
        ok = live[:, None] & (d < D)[None, :]
    else:
        ok = (d < D)[None, :]
    k = tl.load(keys + at, mask=ok, other=0.0)
    weights, shrink, top = fold(
        q, k, top, position, j, end, scale, softcap, WINDOW, SOFTCAP, MASKED
    )
    v = tl.load(values + at, mask=ok, other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "offsets_ptr", "lengths_ptr"])
def attention_kernel(
    q_ptr,  # [T, HQ, D], tokens q_stride apart
    k_ptr,  # [slots, HK, D]
    v_ptr,
    out_ptr,  # [T, HQ, D]
    lse_ptr,  # [T, HQ]
    table_ptr,  # [max_rows, max_pages]
    rows_ptr,  # [S]
    offsets_ptr,  # [S + 1]
    lengths_ptr,  # [S]
    scale,
    softcap,
    q_stride,
    out_stride,
    table_stride,
    WIDTH: tl.constexpr,  # queries of every sequence, or 0 where offsets say
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LSE: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    GROUP: tl.constexpr = HQ // HK
    TOKENS: tl.constexpr = BLOCK_M // GROUP  # queries per tile
    s = tl.program_id(2)
    kv_head = tl.program_id(1)
    # The last tiles see the most keys, so they start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    if WIDTH > 0:
        begin = s * WIDTH
        queries = WIDTH
    else:
        begin = tl.load(offsets_ptr + s)
        queries = tl.load(offsets_ptr + s + 1) - begin
    if first < queries:
        length = tl.load(lengths_ptr + s)
        table_row = table_ptr + tl.load(rows_ptr + s).to(tl.int64) * table_stride
        i = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        token = first + i // GROUP
        head = kv_head * GROUP + i % GROUP
        row_ok = (token < queries) & (i < TOKENS * GROUP)
        position = length - queries + token
        at = (begin + token).to(tl.int64)
        ok = row_ok[:, None] & (d < D)[None, :]
        q = tl.load(
            q_ptr + at[:, None] * q_stride + head[:, None] * D + d[None, :], mask=ok, other=0.0
        )
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        earliest = length - queries + first  # position of the tile's first query
        end = tl.minimum(length, earliest + TOKENS)
        low = 0
        if WINDOW > 0:
            low = tl.maximum(earliest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        else:
            low = tl.maximum(earliest + 1, 0) // BLOCK_N * BLOCK_N
            for start in range(0, low, BLOCK_N):
                acc, top, total = attend(
                    q, acc, top, total, position, start, end, k_ptr, v_ptr, kv_head * D, table_row,
                    scale, softcap, HK * D, D, PAGE, BLOCK_N, BLOCK_D, WINDOW, SOFTCAP, False,
                )  # fmt: skip
        for start in range(low, end, BLOCK_N):
            acc, top, total = attend(
                q, acc, top, total, position, start, end, k_ptr, v_ptr, kv_head * D, table_row,
                scale, softcap, HK * D, D, PAGE, BLOCK_N, BLOCK_D, WINDOW, SOFTCAP, True,
            )  # fmt: skip
        divisor = tl.where(total > 0.0, total, 1.0)
        out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] * out_stride + head[:, None] * D + d[None, :], out, mask=ok)
        if LSE:
            lse = tl.where(total > 0.0, (top + tl.log2(divisor)) * LN2, float("-inf"))
            tl.store(lse_ptr + at * HQ + head, lse, mask=row_ok)


def check_paged(
    q: torch.Tensor, kv: PagedKV, out: torch.Tensor | None, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Checks arguments; returns the tensor for the result, allocated if not given, and lse's."""
    _, q_heads, head_dim = q.shape
    kv_heads = kv.k_pool.shape[1]
    if q_heads % kv_heads:
        raise ValueError(f"q's heads must be a multiple of the pool's {kv_heads}, got {q_heads}")
    if kv.k_pool.shape[2] != head_dim or kv.v_pool.shape != kv.k_pool.shape:
        raise ValueError(
            f"k_pool and v_pool must be alike, with head_dim {head_dim}, got "
            f"{list(kv.k_pool.shape)} and {list(kv.v_pool.shape)}"
        )
    if not (kv.k_pool.is_contiguous() and kv.v_pool.is_contiguous()):
        strides = f"{kv.k_pool.stride()} and {kv.v_pool.stride()}"
        raise ValueError(f"k_pool and v_pool must be dense, got strides {strides}")
    if q.stride()[1:] != (head_dim, 1):
        raise ValueError(f"q must be dense in its last two dimensions, got {q.stride()}")
    if kv.seq_lens.shape != kv.rows.shape or kv.page_table.stride(1) != 1:
        raise ValueError(
            f"seq_lens must be {list(kv.rows.shape)} as rows is and page_table's rows dense, got "
            f"{list(kv.seq_lens.shape)} and strides {kv.page_table.stride()}"
        )
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.stride()[1:] != (head_dim, 1):
        raise ValueError(f"out must be like q, {list(q.shape)}, got {list(out.shape)}")
    lse = None
    if return_lse:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return out, lse


def launch_attention(
    q: torch.Tensor,
    kv: PagedKV,
    offsets: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    queries: int,
) -> None:
    """Launches tiles for up to `queries` queries a sequence; with no offsets each has as many."""
    q_heads, head_dim = q.shape[1:]
    kv_heads, count = kv.k_pool.shape[1], len(kv.rows)
    group = q_heads // kv_heads
    if queries == 0 or count == 0:
        return
    tile: Tile = attention_tile(architecture(q.device).chunk, head_dim, q.dtype)
    block_m = max(tile.rows, triton.next_power_of_2(group))
    attention_kernel[(triton.cdiv(queries, block_m // group), kv_heads, count)](
        q,
        kv.k_pool,
        kv.v_pool,
        out,
        out if lse is None else lse,
        kv.page_table,
        kv.rows,
        kv.rows if offsets is None else offsets,
        kv.seq_lens,
        kv.scale,
        0.0 if kv.softcap is None else kv.softcap,
        q.stride(0),
        out.stride(0),
        kv.page_table.stride(0),
        WIDTH=queries if offsets is None else 0,
        HQ=q_heads,
        HK=kv_heads,
        D=head_dim,
        PAGE=kv.page_size,
        BLOCK_M=block_m,
        BLOCK_N=tile.cols,
        BLOCK_D=triton.next_power_of_2(head_dim),
        WINDOW=kv.window or 0,
        SOFTCAP=kv.softcap is not None,
        LSE=lse is not None,
        num_warps=tile.warps,
        # One table entry per key, loaded ahead as deep as the keys, makes ptxas serialise wgmma.
        num_stages=2 if kv.page_size == 1 else tile.stages,
    )


def attention_portable(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """`attention_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    out, lse = check_paged(q, kv, out, return_lse)
    count = len(kv.rows)
    if cu_seqlens_q.shape != (count + 1,):
        raise ValueError(f"cu_seqlens_q must be [{count + 1}], got {list(cu_seqlens_q.shape)}")
    queries = q.shape[0] if max_seqlen_q is None else max_seqlen_q
    launch_attention(q, kv, cu_seqlens_q, out, lse, queries)
    return out if lse is None else (out, lse)
