"""Cascade decode: shared keys once per group, the rest per sequence, one merge.

The queries of a whole group are the rows of the prefix kernel's tiles, so the shared part turns
from many memory-bound reads into one compute-bound product. Its launch covers as many tiles as
the padded batch could need, for every group; those without queries return at once.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.attention.portable import attend
from minisgl.kernels.cascade import check_window
from minisgl.kernels.config import Architecture, Tile, architecture, attention_tile
from minisgl.kernels.decode.portable import (
    check_decode,
    decode_splits,
    launch_decode,
    split_count,
)
from minisgl.kernels.merge.portable import launch_merge

MAX_PREFIX_SPLITS = 16


@triton.jit(
    do_not_specialize=["lse_split_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "groups_ptr", "lse_ptr"],
)
def prefix_kernel(
    q_ptr,  # [S * WIDTH, HQ, D]
    k_ptr,  # [slots, HK, D]
    v_ptr,
    out_ptr,  # [SPLITS, S * WIDTH, HQ, D]
    lse_ptr,  # [SPLITS, S * WIDTH, HQ], -inf outside the groups
    table_ptr,
    rows_ptr,
    groups_ptr,  # [G, 3]
    scale,
    softcap,
    q_stride,
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
    SOFTCAP: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    GROUP: tl.constexpr = HQ // HK
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    group = groups_ptr + tl.program_id(1) * 3
    first = tl.load(group)
    queries = tl.load(group + 1) * WIDTH
    start_token = tl.program_id(0) * TOKENS
    if start_token < queries:
        splits = tl.num_programs(2) // HK  # no constant: one kernel serves every number of runs
        kv_head = tl.program_id(2) // splits
        split = tl.program_id(2) % splits
        length = tl.load(group + 2) * PAGE
        run = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
        begin = split * run
        end = tl.minimum(begin + run, length)
        i = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        token = start_token + i // GROUP
        head = kv_head * GROUP + i % GROUP
        row_ok = (token < queries) & (i < TOKENS * GROUP)
        ok = row_ok[:, None] & (d < D)[None, :]
        at = (first * WIDTH + token).to(tl.int64)
        if begin < end:
            q = tl.load(
                q_ptr + at[:, None] * q_stride + head[:, None] * D + d[None, :], mask=ok, other=0.0
            )
            table_row = table_ptr + tl.load(rows_ptr + first).to(tl.int64) * table_stride
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            top = tl.full([BLOCK_M], -1.0e30, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            position = tl.zeros([BLOCK_M], tl.int32) + end
            whole = begin + (end - begin) // BLOCK_N * BLOCK_N
            for start in range(begin, whole, BLOCK_N):
                acc, top, total = attend(
                    q, acc, top, total, position, start, end, k_ptr, v_ptr, kv_head * D, table_row,
                    scale, softcap, HK * D, D, PAGE, BLOCK_N, BLOCK_D, 0, SOFTCAP, False,
                )  # fmt: skip
            for start in range(whole, end, BLOCK_N):
                acc, top, total = attend(
                    q, acc, top, total, position, start, end, k_ptr, v_ptr, kv_head * D, table_row,
                    scale, softcap, HK * D, D, PAGE, BLOCK_N, BLOCK_D, 0, SOFTCAP, True,
                )  # fmt: skip
            to = split * split_stride + at[:, None] * (HQ * D) + head[:, None] * D + d[None, :]
            tl.store(out_ptr + to, acc / total[:, None], mask=ok)
            lse = (top + tl.log2(total)) * LN2
            tl.store(lse_ptr + split * lse_split_stride + at * HQ + head, lse, mask=row_ok)


def cascade_splits(
    arch: Architecture, q: torch.Tensor, kv_heads: int, count: int, max_keys: int
) -> tuple[int, int]:
    """Runs of the shared keys and of each sequence's own, for queries [T, Hq, D] of `count`."""
    tokens, q_heads, head_dim = q.shape
    tile, group = attention_tile(arch.chunk, head_dim, q.dtype), q_heads // kv_heads
    tiles = triton.cdiv(tokens, max(tile.rows, triton.next_power_of_2(group)) // group)
    prefixes = split_count(4 * tiles * kv_heads, arch.processors, max_keys, tile.cols)
    suffixes = decode_splits(arch, count, kv_heads, head_dim, max_keys, q.dtype)
    return min(prefixes, MAX_PREFIX_SPLITS), suffixes


def launch_prefix(
    q: torch.Tensor,
    kv: PagedKV,
    groups: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    width: int,
) -> None:
    """Launches one program per tile of queries, group, key head and run of the shared keys.

    out: [splits, S * width, Hq, D]; lse: [splits, S * width, Hq], -inf already.
    """
    splits, tokens, q_heads, head_dim = out.shape
    kv_heads = kv.k_pool.shape[1]
    group = q_heads // kv_heads
    tile: Tile = attention_tile(architecture(q.device).chunk, head_dim, q.dtype)
    block_m = max(tile.rows, triton.next_power_of_2(group))
    tiles = triton.cdiv(tokens, block_m // group)
    prefix_kernel[(tiles, len(groups), kv_heads * splits)](
        q,
        kv.k_pool,
        kv.v_pool,
        out,
        lse,
        kv.page_table,
        kv.rows,
        groups,
        kv.scale,
        0.0 if kv.softcap is None else kv.softcap,
        q.stride(0),
        out.stride(0),
        lse.stride(0),
        kv.page_table.stride(0),
        WIDTH=width,
        HQ=q_heads,
        HK=kv_heads,
        D=head_dim,
        PAGE=kv.page_size,
        BLOCK_M=block_m,
        BLOCK_N=tile.cols,
        BLOCK_D=triton.next_power_of_2(head_dim),
        SOFTCAP=kv.softcap is not None,
        num_warps=tile.warps,
        num_stages=2 if kv.page_size == 1 else tile.stages,
    )


def cascade_portable(
    q: torch.Tensor,
    kv: PagedKV,
    groups: torch.Tensor,
    shared: torch.Tensor,
    *,
    width: int = 1,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """`cascade_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    check_window(kv)
    out, lse = check_decode(q, kv, width, out, return_lse)
    count = len(kv.rows)
    if groups.shape[1:] != (3,) or not groups.is_contiguous() or shared.shape != (count,):
        raise ValueError(
            f"groups must be dense [G, 3] and shared [{count}], got "
            f"{list(groups.shape)} and {list(shared.shape)}"
        )
    if count == 0:
        return out if lse is None else (out, lse)
    max_keys = kv.page_table.shape[1] * kv.page_size
    arch = architecture(q.device)
    prefixes, suffixes = cascade_splits(arch, q, kv.k_pool.shape[1], count, max_keys)
    shape = (prefixes + suffixes, *q.shape)
    parts = torch.empty(shape, dtype=torch.float32, device=q.device)
    part_lse = torch.full(shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    launch_prefix(q, kv, groups, parts[:prefixes], part_lse[:prefixes], width)
    launch_decode(q, kv, parts[prefixes:], part_lse[prefixes:], width, suffixes, skipped=shared)
    launch_merge(parts, part_lse, out, lse)
    return out if lse is None else (out, lse)
