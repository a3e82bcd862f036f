"""Warp-specialised attention for Hopper, in Gluon: a producer warp and two consumers in turns.

The producer has the tensor memory accelerator copy keys and values, page by page, into stages of
shared memory, and signals barriers; the consumers, a warpgroup of 4 warps each, never compute an
address. Each holds 64 rows of queries, and scores and results of its own. Two things keep the
tensor cores busy during softmax (Shah et al., "FlashAttention-3", 2024): within a consumer, this
tile's weights and values are multiplied while the next tile's weights are computed; and the
consumers pass a turn between them, so that one issues products while the other computes weights.

Programs stay: each takes item after item, a tile of queries of a key head, from a list (`tiles`).
Stages and turns go on from one item to the next, so all partitions number the tiles of keys of all
items n = 0, 1, ...: n uses stage n % STAGES for the (n // STAGES)-th time, and the parity of that
tells the phases of its barriers.

    full[stage]: completed by the bytes that the producer expects.
    empty[stage]: two arrivals, one of each consumer, after the products that read the stage.
    turn of consumer c: named barrier 8 + c of 256 threads, the 128 that pass the turn and the 128
        that wait for it. Once a tile each consumer waits for its turn, issues products, passes the
        turn. Both take as many, also where the mask hides a tile from one of them: a turn that is
        not taken would stop the other for good. Consumer 0 begins, by passing to itself once.

Turns order no memory, only the pace. `tests/kernels/test_hopper_protocol.py` says why nothing waits
for ever and nothing is overwritten while it is read, and goes through all interleavings.

A head is held as two halves of 64 columns, 128 bytes each, so that the rows of a page are one
contiguous piece of a swizzled buffer whatever the page size. Only this shape is served: bf16 or
fp16, head_dim 128, pages of 16 tokens or more, no window and no soft cap; all else is refused.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minisgl.kernels.attention import hopper_refusal
from minisgl.kernels.attention.hopper_feed import HALF, item_of, laps, produce
from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.attention.portable import check_paged
from minisgl.kernels.attention.tiles import tile_list
from minisgl.kernels.config import architecture

BLOCK_M = 128
BLOCK_N = 128
STAGES = 2
CONSUMER_WARPS = 4  # of each of the two
PRODUCER_REGISTERS = gl.constexpr(40)  # per thread; 24 spill with pages of 16
CONSUMER_REGISTERS = gl.constexpr(232)  # 2 x 232 + 40 <= 65,536 / 128


@gluon.jit
def _wait_turn(CONSUMER: gl.constexpr):
    BAR: gl.constexpr = "bar.sync 8, 256;" if CONSUMER == 0 else "bar.sync 9, 256;"
    ASM: gl.constexpr = BAR + " mov.b32 $0, 0;"  # assembly must have a result
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _pass_turn(TO: gl.constexpr):
    BAR: gl.constexpr = "bar.arrive 8, 256;" if TO == 0 else "bar.arrive 9, 256;"
    ASM: gl.constexpr = BAR + " mov.b32 $0, 0;"  # assembly must have a result
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


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
    tile, done, p, top, total, left, right, q0, q1, k_buffer, v_buffer, k_full, k_empty, v_full,
    v_empty, position, end, scale_log2, ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    S: gl.constexpr, P: gl.constexpr, OUT_ROW: gl.constexpr, CONSUMER: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """Scores and weights of `tile`; adds the values of the tile before."""
    none = gl.zeros([ROWS, BN], gl.float32, layout=S)
    n = done + tile
    stage = n % STAGES
    before = (n - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
    _wait_turn(CONSUMER)
    s = warpgroup_mma(
        q0, k_buffer.index(2 * stage).permute((1, 0)), none, use_acc=False, is_async=True
    )
    s = warpgroup_mma(q1, k_buffer.index(2 * stage + 1).permute((1, 0)), s, is_async=True)
    mbarrier.wait(v_full.index(before), ((n - 1) // STAGES) & 1)
    left_next = warpgroup_mma(p, v_buffer.index(2 * before), left, is_async=True)
    right_next = warpgroup_mma(p, v_buffer.index(2 * before + 1), right, is_async=True)
    _pass_turn(1 - CONSUMER)
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
    q_ptr, out_ptr, lse_ptr, tiles_ptr, offsets_ptr, lengths_ptr, q_buffer, k_buffer, v_buffer,
    k_full, k_empty, v_full, v_empty, scale_log2, q_stride, out_stride,
    HQ: gl.constexpr, HK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr, LSE: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Rows CONSUMER * ROWS on of every item."""
    LN2: gl.constexpr = 0.6931471805599453
    GROUP: gl.constexpr = HQ // HK
    TOKENS: gl.constexpr = BM // GROUP
    ROWS: gl.constexpr = BM // 2
    S: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16]
    )
    O: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, HALF, 16]
    )
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O)
    q0 = q_buffer.index(0).slice(CONSUMER * ROWS, ROWS, 0)
    q1 = q_buffer.index(1).slice(CONSUMER * ROWS, ROWS, 0)
    none = gl.zeros([ROWS, BN], gl.float32, layout=S)
    done = 0  # tiles of keys of the items before
    if CONSUMER == 0:
        _pass_turn(0)
    for lap in range(laps(tiles_ptr, HK)):
        _, kv_head, first, begin, queries, earliest, end, tiles = item_of(
            lap, tiles_ptr, offsets_ptr, lengths_ptr, HK, TOKENS, BN
        )
        if tiles > 0:
            i = CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
            d = gl.arange(0, HALF, layout=gl.SliceLayout(0, L))
            token = first + i // GROUP
            ok = ((token < queries) & (i < TOKENS * GROUP))[:, None]
            at = (begin + token).to(gl.int64)[:, None] * q_stride
            at += (kv_head * GROUP + i % GROUP)[:, None] * (2 * HALF) + d[None, :]
            # The consumer's warps met after the last products that read the queries before these.
            q0.store(gl.load(q_ptr + at, mask=ok, other=0.0))
            q1.store(gl.load(q_ptr + at + HALF, mask=ok, other=0.0))
            fence_async_shared()
            gl.thread_barrier()

            position = earliest + (CONSUMER * ROWS + gl.arange(0, ROWS, layout=ROW)) // GROUP
            top = gl.full([ROWS], -1.0e30, gl.float32, layout=ROW)
            left = gl.zeros([ROWS, HALF], gl.float32, layout=O)
            right = gl.zeros([ROWS, HALF], gl.float32, layout=O)
            stage = done % STAGES
            mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
            _wait_turn(CONSUMER)
            s = warpgroup_mma(
                q0, k_buffer.index(2 * stage).permute((1, 0)), none, use_acc=False, is_async=True
            )
            s = warpgroup_mma(q1, k_buffer.index(2 * stage + 1).permute((1, 0)), s, is_async=True)
            _pass_turn(1 - CONSUMER)
            scores = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage), count=1)
            weights, _shrink, top, total = _weights(
                scores, top, position, 0, end, scale_log2, BN, S, True
            )
            p = gl.convert_layout(weights.to(q_buffer.dtype), P)
            # All rows of this consumer see all keys of the first tiles, which need no mask.
            whole = (earliest + CONSUMER * ROWS // GROUP + 1) // BN
            whole = gl.minimum(gl.maximum(whole, 1), tiles)
            for tile in range(1, whole):
                p, top, total, left, right = _step(
                    tile, done, p, top, total, left, right, q0, q1, k_buffer, v_buffer, k_full,
                    k_empty, v_full, v_empty, position, end, scale_log2, ROWS, BN, STAGES, S, P,
                    OUT_ROW, CONSUMER, False,
                )  # fmt: skip
            for tile in range(whole, tiles):
                p, top, total, left, right = _step(
                    tile, done, p, top, total, left, right, q0, q1, k_buffer, v_buffer, k_full,
                    k_empty, v_full, v_empty, position, end, scale_log2, ROWS, BN, STAGES, S, P,
                    OUT_ROW, CONSUMER, True,
                )  # fmt: skip
            done += tiles
            last = (done - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((done - 1) // STAGES) & 1)
            left = warpgroup_mma(p, v_buffer.index(2 * last), left, is_async=True)
            right = warpgroup_mma(p, v_buffer.index(2 * last + 1), right, is_async=True)
            left, right, p = warpgroup_mma_wait(0, deps=[left, right, p])
            mbarrier.arrive(v_empty.index(last), count=1)

            divisor = gl.where(total > 0.0, total, 1.0)
            inverse = gl.convert_layout(1.0 / divisor, OUT_ROW)[:, None]
            i = CONSUMER * ROWS + gl.arange(0, ROWS, layout=OUT_ROW)
            token = first + i // GROUP
            ok = ((token < queries) & (i < TOKENS * GROUP))[:, None]
            at = (begin + token).to(gl.int64)[:, None] * out_stride
            at += (kv_head * GROUP + i % GROUP)[:, None] * (2 * HALF)
            at += gl.arange(0, HALF, layout=gl.SliceLayout(0, O))[None, :]
            gl.store(out_ptr + at, (left * inverse).to(q_buffer.dtype), mask=ok)
            gl.store(out_ptr + at + HALF, (right * inverse).to(q_buffer.dtype), mask=ok)
            if LSE:
                r = CONSUMER * ROWS + gl.arange(0, ROWS, layout=ROW)
                token = first + r // GROUP
                lse = gl.where(total > 0.0, (top + gl.log2(divisor)) * LN2, float("-inf"))
                to = lse_ptr + (begin + token).to(gl.int64) * HQ + kv_head * GROUP + r % GROUP
                gl.store(to, lse, mask=(token < queries) & (r < TOKENS * GROUP))


@gluon.jit(do_not_specialize_on_alignment=["rows_ptr", "offsets_ptr", "lengths_ptr"])
def attention_hopper_kernel(
    q_ptr, k_pool, v_pool, out_ptr, lse_ptr, table_ptr, rows_ptr, tiles_ptr, offsets_ptr,
    lengths_ptr, scale_log2, q_stride, out_stride, table_stride,
    HQ: gl.constexpr, HK: gl.constexpr, PAGE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, LSE: gl.constexpr, Q_LAYOUT: gl.constexpr, KV_LAYOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    q_buffer = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, BM, HALF], Q_LAYOUT)
    k_buffer = gl.allocate_shared_memory(k_pool.dtype, [2 * STAGES, BN, HALF], KV_LAYOUT)
    v_buffer = gl.allocate_shared_memory(v_pool.dtype, [2 * STAGES, BN, HALF], KV_LAYOUT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()  # copies must find the barriers made
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q_ptr, out_ptr, lse_ptr, tiles_ptr, offsets_ptr, lengths_ptr, q_buffer,
                    k_buffer, v_buffer, k_full, k_empty, v_full, v_empty, scale_log2, q_stride,
                    out_stride, HQ, HK, BM, BN, STAGES, num_warps, LSE, 0,
                ),
            ),
            (
                _consume,
                (
                    q_ptr, out_ptr, lse_ptr, tiles_ptr, offsets_ptr, lengths_ptr, q_buffer,
                    k_buffer, v_buffer, k_full, k_empty, v_full, v_empty, scale_log2, q_stride,
                    out_stride, HQ, HK, BM, BN, STAGES, num_warps, LSE, 1,
                ),
            ),
            (
                produce,
                (
                    k_pool, v_pool, table_ptr, rows_ptr, tiles_ptr, offsets_ptr, lengths_ptr,
                    k_buffer, v_buffer, k_full, k_empty, v_full, v_empty, table_stride,
                    HK, BM // (HQ // HK), PAGE, BN, STAGES,
                ),
            ),
        ],
        [num_warps, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
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
    if q.shape[0] and count:
        element = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
        half = HALF.value
        box = [min(kv.page_size, BLOCK_N), half]
        layout = gl.NVMMASharedLayout.get_default_for(box, element)
        keys, values = (
            TensorDescriptor.from_tensor(pool.flatten(1), box, layout)
            for pool in (kv.k_pool, kv.v_pool)
        )
        tiles = tile_list(cu_seqlens_q, kv.seq_lens, BLOCK_M // (q_heads // kv_heads), q.shape[0])
        most = (len(tiles) - 1) * kv_heads
        grid = (min(architecture(q.device).processors, most),)
        attention_hopper_kernel[grid](
            q, keys, values, out, out if lse is None else lse, kv.page_table, kv.rows,
            tiles, cu_seqlens_q, kv.seq_lens, kv.scale * 1.4426950408889634, q.stride(0),
            out.stride(0), kv.page_table.stride(0),
            HQ=q_heads, HK=kv_heads, PAGE=kv.page_size, BM=BLOCK_M, BN=BLOCK_N, STAGES=STAGES,
            LSE=lse is not None,
            Q_LAYOUT=gl.NVMMASharedLayout.get_default_for([BLOCK_M, half], element),
            KV_LAYOUT=gl.NVMMASharedLayout.get_default_for([BLOCK_N, half], element),
            num_warps=CONSUMER_WARPS,
        )  # fmt: skip
    return out if lse is None else (out, lse)
