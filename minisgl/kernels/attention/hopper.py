"""Warp-specialised attention for Hopper, in Gluon: a producer warp and two consumer warpgroups.

The producer has the tensor memory accelerator copy keys and values, page by page, into stages of
shared memory, and signals barriers; the consumers never compute an address. The product of this
tile's weights and values and the scores of the next tile run on the tensor cores while the next
weights are computed (Shah et al., "FlashAttention-3", 2024).

A head is held as two halves of 64 columns, 128 bytes each, so that the rows of a page are one
contiguous piece of a swizzled buffer whatever the page size. Only this shape is served: bf16 or
fp16, head_dim 128, pages of 16 tokens or more, no window and no soft cap; all else is refused.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minisgl.kernels.attention import hopper_refusal
from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.attention.portable import check_paged

BLOCK_M = 128
BLOCK_N = 128
STAGES = 2
CONSUMER_WARPS = 8
HALF = gl.constexpr(64)
PRODUCER_REGISTERS = gl.constexpr(40)  # per thread; 24 spill with pages of 16

# Triton 3.9 renames the copy.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _request(
    pool, table_row, buffer, full, tile, stage, end, column, PAGE: gl.constexpr, BN: gl.constexpr
):
    """Asks for keys (or values) tile * BN on; what lies beyond `end` comes from page 0."""
    BOX: gl.constexpr = PAGE if PAGE < BN else BN
    mbarrier.expect(full.index(stage), BN * 2 * HALF * 2)
    for part in gl.static_range(BN // BOX):
        key = tile * BN + part * BOX
        page = gl.load(table_row + key // PAGE, mask=key < end, other=0)
        slot = page * PAGE + key % PAGE
        for half in gl.static_range(2):
            to = buffer.index(2 * stage + half).slice(part * BOX, BOX, 0)
            tma_load(pool, [slot, column + half * HALF], full.index(stage), to)


@gluon.jit
def _produce(
    k_pool, v_pool, table_row, k_buffer, v_buffer, k_full, k_empty, v_full, v_empty,
    tiles, end, column, PAGE: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for tile in range(tiles):
        stage = tile % STAGES
        free = ((tile // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), free)
        _request(k_pool, table_row, k_buffer, k_full, tile, stage, end, column, PAGE, BN)
        mbarrier.wait(v_empty.index(stage), free)
        _request(v_pool, table_row, v_buffer, v_full, tile, stage, end, column, PAGE, BN)


@gluon.jit
def _computed(sums):
    """`sums`, which are computed before whatever follows.

    Without this, ptxas moves the wait for the products above the softmax, and nothing overlaps. It
    does not move it over an instruction with an effect that depends on the sums. They are never
    negative, so that no thread sleeps.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred negative;
        .reg .f32 least;
        min.f32 least, $2, $3;
        setp.lt.f32 negative, least, 0f00000000;
        @negative nanosleep.u32 1;
        mov.b32 $0, $2;
        mov.b32 $1, $3;
        }""",
        "=f,=f,f,f",
        [sums],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def _weights(
    scores, top, position, tile, end, scale_log2, BN: gl.constexpr, LAYOUT: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """(weights, factor for what came before, new maximum, sum of weights); maxima in base 2.

    Scores are scaled and the maximum subtracted in one multiply-add: the scale must be positive.
    """
    if MASK:
        j = tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, LAYOUT))
        visible = (j[None, :] <= position[:, None]) & (j < end)[None, :]
        scores = gl.where(visible, scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - new_top[:, None])
    return weights, gl.exp2(top - new_top), new_top, gl.sum(weights, 1)


@gluon.jit
def _step(
    tile, p, top, total, left, right, q0, q1, k_buffer, v_buffer, k_full, k_empty, v_full,
    v_empty, position, end, scale_log2, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    S: gl.constexpr, P: gl.constexpr, OUT_ROW: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores and weights of `tile`; adds the values of the tile before."""
    none = gl.zeros([BM, BN], gl.float32, layout=S)
    stage = tile % STAGES
    before = (tile - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    s = warpgroup_mma(
        q0, k_buffer.index(2 * stage).permute((1, 0)), none, use_acc=False, is_async=True
    )
    s = warpgroup_mma(q1, k_buffer.index(2 * stage + 1).permute((1, 0)), s, is_async=True)
    mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)
    left_next = warpgroup_mma(p, v_buffer.index(2 * before), left, is_async=True)
    right_next = warpgroup_mma(p, v_buffer.index(2 * before + 1), right, is_async=True)
    scores = warpgroup_mma_wait(2, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, shrink, top, added = _weights(
        scores, top, position, tile, end, scale_log2, BN, S, MASK
    )
    added = _computed(added)
    left, right, p = warpgroup_mma_wait(0, deps=[left_next, right_next, p])
    mbarrier.arrive(v_empty.index(before), count=1)
    factor = gl.convert_layout(shrink, OUT_ROW)[:, None]
    left = left * factor
    right = right * factor
    total = total * shrink + added
    p = gl.convert_layout(weights.to(q0.dtype), P)
    return p, top, total, left, right


@gluon.jit
def _consume(
    q_buffer, k_buffer, v_buffer, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr,
    begin, first, queries, earliest, tiles, end, kv_head, scale_log2, out_stride,
    HQ: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    LN2: gl.constexpr = 0.6931471805599453
    TOKENS: gl.constexpr = BM // GROUP
    S: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16]
    )
    O: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, HALF, 16]
    )
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O)
    position = earliest + gl.arange(0, BM, layout=ROW) // GROUP
    top = gl.full([BM], -1.0e30, gl.float32, layout=ROW)
    left = gl.zeros([BM, HALF], gl.float32, layout=O)
    right = gl.zeros([BM, HALF], gl.float32, layout=O)
    none = gl.zeros([BM, BN], gl.float32, layout=S)

    q0 = q_buffer.index(0)
    q1 = q_buffer.index(1)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q0, k_buffer.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma(q1, k_buffer.index(1).permute((1, 0)), s, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    weights, _, top, total = _weights(scores, top, position, 0, end, scale_log2, BN, S, True)
    p = gl.convert_layout(weights.to(q_buffer.dtype), P)
    # Every row sees all keys of the first tiles, which need no mask.
    whole = gl.minimum(gl.maximum((earliest + 1) // BN, 1), tiles)
    for tile in range(1, whole):
        p, top, total, left, right = _step(
            tile, p, top, total, left, right, q0, q1, k_buffer, v_buffer, k_full, k_empty, v_full,
            v_empty, position, end, scale_log2, BM, BN, STAGES, S, P, OUT_ROW, False,
        )  # fmt: skip
    for tile in range(whole, tiles):
        p, top, total, left, right = _step(
            tile, p, top, total, left, right, q0, q1, k_buffer, v_buffer, k_full, k_empty, v_full,
            v_empty, position, end, scale_log2, BM, BN, STAGES, S, P, OUT_ROW, True,
        )  # fmt: skip
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    left = warpgroup_mma(p, v_buffer.index(2 * last), left)
    right = warpgroup_mma(p, v_buffer.index(2 * last + 1), right)

    divisor = gl.where(total > 0.0, total, 1.0)
    inverse = gl.convert_layout(1.0 / divisor, OUT_ROW)[:, None]
    i = gl.arange(0, BM, layout=OUT_ROW)
    token = first + i // GROUP
    ok = ((token < queries) & (i < TOKENS * GROUP))[:, None]
    at = (begin + token).to(gl.int64)[:, None] * out_stride
    at += (kv_head * GROUP + i % GROUP)[:, None] * (2 * HALF)
    at += gl.arange(0, HALF, layout=gl.SliceLayout(0, O))[None, :]
    gl.store(out_ptr + at, (left * inverse).to(q_buffer.dtype), mask=ok)
    gl.store(out_ptr + at + HALF, (right * inverse).to(q_buffer.dtype), mask=ok)
    if LSE:
        r = gl.arange(0, BM, layout=ROW)
        token = first + r // GROUP
        lse = gl.where(total > 0.0, (top + gl.log2(divisor)) * LN2, float("-inf"))
        to = lse_ptr + (begin + token).to(gl.int64) * HQ + kv_head * GROUP + r % GROUP
        gl.store(to, lse, mask=(token < queries) & (r < TOKENS * GROUP))


@gluon.jit(do_not_specialize_on_alignment=["rows_ptr", "offsets_ptr", "lengths_ptr"])
def attention_hopper_kernel(
    q_ptr, k_pool, v_pool, out_ptr, lse_ptr, table_ptr, rows_ptr, offsets_ptr, lengths_ptr,
    scale_log2, q_stride, out_stride, table_stride,
    HQ: gl.constexpr, HK: gl.constexpr, PAGE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, LSE: gl.constexpr, Q_LAYOUT: gl.constexpr, KV_LAYOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    GROUP: gl.constexpr = HQ // HK
    TOKENS: gl.constexpr = BM // GROUP
    sequence = gl.program_id(2)
    kv_head = gl.program_id(1)
    first = (gl.num_programs(0) - 1 - gl.program_id(0)) * TOKENS
    begin = gl.load(offsets_ptr + sequence)
    queries = gl.load(offsets_ptr + sequence + 1) - begin
    length = gl.load(lengths_ptr + sequence)
    table_row = table_ptr + gl.load(rows_ptr + sequence).to(gl.int64) * table_stride
    earliest = length - queries + first
    end = gl.minimum(length, earliest + TOKENS)
    end = gl.where(first < queries, end, 0)
    tiles = gl.maximum(gl.cdiv(end, BN), 1)  # a tile that shows nothing gives 0

    q_buffer = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, BM, HALF], Q_LAYOUT)
    k_buffer = gl.allocate_shared_memory(k_pool.dtype, [2 * STAGES, BN, HALF], KV_LAYOUT)
    v_buffer = gl.allocate_shared_memory(v_pool.dtype, [2 * STAGES, BN, HALF], KV_LAYOUT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=1)

    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    i = gl.arange(0, BM, layout=gl.SliceLayout(1, L))
    d = gl.arange(0, HALF, layout=gl.SliceLayout(0, L))
    token = first + i // GROUP
    ok = ((token < queries) & (i < TOKENS * GROUP))[:, None]
    at = (begin + token).to(gl.int64)[:, None] * q_stride
    at += (kv_head * GROUP + i % GROUP)[:, None] * (2 * HALF) + d[None, :]
    for half in gl.static_range(2):
        q = gl.load(q_ptr + at + half * HALF, mask=ok, other=0.0)
        q_buffer.index(half).store(q)
    fence_async_shared()

    column = kv_head * (2 * HALF)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q_buffer, k_buffer, v_buffer, k_full, k_empty, v_full, v_empty, out_ptr,
                    lse_ptr, begin, first, queries, earliest, tiles, end, kv_head, scale_log2,
                    out_stride, HQ, GROUP, BM, BN, STAGES, num_warps, LSE,
                ),
            ),
            (
                _produce,
                (
                    k_pool, v_pool, table_row, k_buffer, v_buffer, k_full, k_empty, v_full,
                    v_empty, tiles, end, column, PAGE, BN, STAGES,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def attention_hopper(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """`attention_reference` on Hopper. Raises ValueError for what it does not serve."""
    out, lse = check_paged(q, kv, out, return_lse)
    q_heads, head_dim = q.shape[1:]
    kv_heads, count = kv.k_pool.shape[1], len(kv.rows)
    refusal = hopper_refusal(head_dim, q.dtype, kv.page_size, kv.window, kv.softcap)
    if refusal is not None:
        raise ValueError(refusal)
    if kv.scale <= 0:
        raise ValueError(f"needs a scale above 0, got {kv.scale}")
    if q_heads // kv_heads > BLOCK_M:
        raise ValueError(f"serves up to {BLOCK_M} query heads per key head, got {q_heads}")
    queries = q.shape[0] if max_seqlen_q is None else max_seqlen_q
    if queries and count:
        element = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
        half = HALF.value
        box = [min(kv.page_size, BLOCK_N), half]
        layout = gl.NVMMASharedLayout.get_default_for(box, element)
        keys, values = (
            TensorDescriptor.from_tensor(pool.flatten(1), box, layout)
            for pool in (kv.k_pool, kv.v_pool)
        )
        grid = (triton.cdiv(queries, BLOCK_M // (q_heads // kv_heads)), kv_heads, count)
        attention_hopper_kernel[grid](
            q, keys, values, out, out if lse is None else lse, kv.page_table, kv.rows,
            cu_seqlens_q, kv.seq_lens, kv.scale * 1.4426950408889634, q.stride(0), out.stride(0),
            kv.page_table.stride(0),
            HQ=q_heads, HK=kv_heads, PAGE=kv.page_size, BM=BLOCK_M, BN=BLOCK_N, STAGES=STAGES,
            LSE=lse is not None,
            Q_LAYOUT=gl.NVMMASharedLayout.get_default_for([BLOCK_M, half], element),
            KV_LAYOUT=gl.NVMMASharedLayout.get_default_for([BLOCK_N, half], element),
            num_warps=CONSUMER_WARPS,
        )  # fmt: skip
    return out if lse is None else (out, lse)
