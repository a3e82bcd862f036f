"""Split-KV decode: each program reads one run of one sequence's keys, once, for a whole group.

All queries of the sequence (a token and its drafts) and all query heads of the group are rows of
one tile, so drafts cost no further reads. The number of runs is fixed at launch, from the padded
batch; where they begin and end is computed on the device from the lengths. A run without keys
leaves lse = -inf and nothing else, and `merge` ignores it.
Source: "Flash-Decoding for long-context inference", Dao et al., 2023.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.attention.portable import attend, check_paged, launch_attention
from minisgl.kernels.config import (
    Architecture,
    Tile,
    architecture,
    attention_tile,
    batch_invariant,
)
from minisgl.kernels.merge.portable import launch_merge

MAX_ROWS = 64  # of a tile; more queries times heads than this read the keys again
MAX_SPLITS = 32


@triton.jit(
    do_not_specialize=["lse_split_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "lengths_ptr", "skipped_ptr", "lse_ptr"],
)
def decode_kernel(
    q_ptr,  # [S * WIDTH, HQ, D]
    k_ptr,  # [slots, HK, D]
    v_ptr,
    out_ptr,  # [SPLITS, S * WIDTH, HQ, D]
    lse_ptr,  # [SPLITS, S * WIDTH, HQ]
    table_ptr,  # [max_rows, max_pages]
    rows_ptr,  # [S]
    lengths_ptr,  # [S]
    skipped_ptr,  # [S]: keys at the beginning that are not for this launch
    scale,
    softcap,
    q_stride,
    out_stride,
    split_stride,
    lse_split_stride,
    table_stride,
    WIDTH: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TILES: tl.constexpr,
    SKIP: tl.constexpr,
    LSE: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    GROUP: tl.constexpr = HQ // HK
    s = tl.program_id(0) // ROW_TILES
    i = tl.program_id(0) % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)  # no constant: one kernel serves every number of runs
    length = tl.load(lengths_ptr + s)
    low = 0
    if SKIP:
        low = tl.load(skipped_ptr + s)
    if WINDOW > 0:
        low = tl.maximum(low, tl.maximum(length - WIDTH - WINDOW + 1, 0) // BLOCK_N * BLOCK_N)
    run = tl.cdiv(tl.cdiv(tl.maximum(length - low, 0), BLOCK_N), splits) * BLOCK_N
    begin = low + split * run
    end = tl.minimum(begin + run, length)
    d = tl.arange(0, BLOCK_D)
    token = i // GROUP
    head = kv_head * GROUP + i % GROUP
    row_ok = token < WIDTH
    at = (s * WIDTH + token).to(tl.int64)
    lse_at = lse_ptr + split * lse_split_stride + at * HQ + head
    # With a single run its output is the result, which must be written even when it is zero.
    if (begin < end) | (splits == 1):
        ok = row_ok[:, None] & (d < D)[None, :]
        q = tl.load(
            q_ptr + at[:, None] * q_stride + head[:, None] * D + d[None, :], mask=ok, other=0.0
        )
        table_row = table_ptr + tl.load(rows_ptr + s).to(tl.int64) * table_stride
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        position = length - WIDTH + token
        for start in range(begin, end, BLOCK_N):
            acc, top, total = attend(
                q, acc, top, total, position, start, end, k_ptr, v_ptr, kv_head * D, table_row,
                scale, softcap, HK * D, D, PAGE, BLOCK_N, BLOCK_D, WINDOW, SOFTCAP, True,
            )  # fmt: skip
        divisor = tl.where(total > 0.0, total, 1.0)
        to = split * split_stride + at[:, None] * out_stride + head[:, None] * D + d[None, :]
        tl.store(out_ptr + to, (acc / divisor[:, None]).to(out_ptr.dtype.element_ty), mask=ok)
        if LSE:
            lse = tl.where(total > 0.0, (top + tl.log2(divisor)) * LN2, float("-inf"))
            tl.store(lse_at, lse, mask=row_ok)
    elif LSE:
        tl.store(lse_at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=row_ok)


def split_count(programs: int, processors: int, max_keys: int, block_n: int) -> int:
    """Runs per sequence: a power of two, about four programs to a processor.

    It depends on shapes only, never on lengths, so that a captured launch stays valid.
    """
    wanted = max(1, min(4 * processors // max(1, programs), MAX_SPLITS))
    useful = triton.next_power_of_2(triton.cdiv(max_keys, block_n))
    return min(1 << (wanted.bit_length() - 1), useful)


def decode_splits(
    arch: Architecture,
    count: int,
    kv_heads: int,
    head_dim: int,
    max_keys: int,
    dtype: torch.dtype,
) -> int:
    """Runs per sequence of a launch for `count` sequences."""
    tile = attention_tile(arch.decode, head_dim, dtype)
    return split_count(count * kv_heads, arch.processors, max_keys, tile.cols)


def launch_decode(
    q: torch.Tensor,
    kv: PagedKV,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    width: int,
    splits: int,
    skipped: torch.Tensor | None = None,
) -> None:
    """Launches one program per sequence, group and run. out: [splits, S * width, Hq, D]."""
    q_heads, head_dim = q.shape[1:]
    kv_heads = kv.k_pool.shape[1]
    needed = triton.next_power_of_2(width * (q_heads // kv_heads))
    tile: Tile = attention_tile(architecture(q.device).decode, head_dim, q.dtype)
    block_m = min(MAX_ROWS, max(tile.rows, needed))
    row_tiles = max(1, needed // block_m)
    decode_kernel[(len(kv.rows) * row_tiles, kv_heads, splits)](
        q,
        kv.k_pool,
        kv.v_pool,
        out,
        out if lse is None else lse,
        kv.page_table,
        kv.rows,
        kv.seq_lens,
        kv.seq_lens if skipped is None else skipped,
        kv.scale,
        0.0 if kv.softcap is None else kv.softcap,
        q.stride(0),
        out.stride(1),
        out.stride(0),
        0 if lse is None else lse.stride(0),
        kv.page_table.stride(0),
        WIDTH=width,
        HQ=q_heads,
        HK=kv_heads,
        D=head_dim,
        PAGE=kv.page_size,
        BLOCK_M=block_m,
        BLOCK_N=tile.cols,
        BLOCK_D=triton.next_power_of_2(head_dim),
        WINDOW=kv.window or 0,
        SOFTCAP=kv.softcap is not None,
        ROW_TILES=row_tiles,
        SKIP=skipped is not None,
        LSE=lse is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def check_decode(
    q: torch.Tensor, kv: PagedKV, width: int, out: torch.Tensor | None, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`check_paged`, where every sequence has `width` queries."""
    if len(q) != len(kv.rows) * width:
        raise ValueError(f"q must have {len(kv.rows)} x {width} tokens, got {len(q)}")
    return check_paged(q, kv, out, return_lse)


def decode_portable(
    q: torch.Tensor,
    kv: PagedKV,
    *,
    width: int = 1,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """`decode_reference` on a GPU. Raises ValueError for shapes that do not fit.

    Under `config.fixed_order` the kernel of `attention` is used: a query then goes through the
    same operations in the same order whether it is decoded, verified or prefilled.
    """
    out, lse = check_decode(q, kv, width, out, return_lse)
    if len(kv.rows) == 0:
        return out if lse is None else (out, lse)
    if batch_invariant():
        launch_attention(q, kv, None, out, lse, queries=width)
        return out if lse is None else (out, lse)
    max_keys = kv.page_table.shape[1] * kv.page_size
    arch, (_, kv_heads, head_dim) = architecture(q.device), kv.k_pool.shape
    splits = decode_splits(arch, len(kv.rows), kv_heads, head_dim, max_keys, q.dtype)
    if splits == 1:
        launch_decode(q, kv, out[None], None if lse is None else lse[None], width, splits)
    else:
        parts = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device)
        launch_decode(q, kv, parts, part_lse, width, splits)
        launch_merge(parts, part_lse, out, lse)
    return out if lse is None else (out, lse)
