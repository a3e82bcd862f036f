"""Queries, keys and values made ready for attention in one launch over the projection.

A program takes a tile of one token's query heads, or of its key heads together with the value
heads beside them; keys and values go straight to their slot. A tile spans several heads so that
one warp's loads of a half-head stay 128 bits wide.
"""

import torch
import triton
import triton.language as tl

HEADS = 8  # heads per program


@triton.jit
def turn(x1, x2, cos, sin):
    """Rotates pairs (x1, x2), [heads, R/2] each, by [R/2] angles."""
    return x1 * cos[None, :] - x2 * sin[None, :], x2 * cos[None, :] + x1 * sin[None, :]


@triton.jit
def _prepare_heads(
    source,  # pointers to the heads, [HEADS, 1]
    to,
    head_ok,
    weight_ptr,
    cos,
    sin,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    i = tl.arange(0, BLOCK_HALF)[None, :]
    ok = head_ok & (i < R // 2)
    first = i * 2 if INTERLEAVED else i
    second = first + 1 if INTERLEAVED else first + R // 2
    x1 = tl.load(source + first, mask=ok, other=0.0).to(tl.float32)
    x2 = tl.load(source + second, mask=ok, other=0.0).to(tl.float32)
    rest = R + tl.arange(0, BLOCK_REST)[None, :]
    keep = head_ok & (rest < D)
    if NORM:
        squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        if R < D:
            x3 = tl.load(source + rest, mask=keep, other=0.0).to(tl.float32)
            squares += tl.sum(x3 * x3, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        offset = 1.0 if UNIT_OFFSET else 0.0
        inside = i < R // 2
        w1 = tl.load(weight_ptr + first, mask=inside, other=0.0).to(tl.float32) + offset
        w2 = tl.load(weight_ptr + second, mask=inside, other=0.0).to(tl.float32) + offset
        x1 = x1 * scale * w1
        x2 = x2 * scale * w2
    y1, y2 = turn(x1, x2, cos, sin)
    out_dtype = to.dtype.element_ty
    tl.store(to + first, y1.to(DTYPE).to(out_dtype), mask=ok)
    tl.store(to + second, y2.to(DTYPE).to(out_dtype), mask=ok)
    if R < D:
        x3 = tl.load(source + rest, mask=keep, other=0.0).to(tl.float32)
        if NORM:
            w3 = tl.load(weight_ptr + rest, mask=rest < D, other=0.0).to(tl.float32) + offset
            x3 = x3 * scale * w3
        tl.store(to + rest, x3.to(DTYPE).to(out_dtype), mask=keep)


@triton.jit
def qkv_prepare_kernel(
    qkv_ptr,  # [T, (HQ + 2 HK) D]
    positions_ptr,  # [T]
    cos_sin_ptr,  # [max_position, R]
    q_ptr,  # [T, HQ, D]
    k_pool_ptr,  # [slots, HK, D]
    v_pool_ptr,
    slots_ptr,  # [T]
    q_weight_ptr,  # [D]
    k_weight_ptr,
    eps,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    Q_GROUPS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    i = tl.arange(0, BLOCK_HALF)
    at = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * R + i
    cos = tl.load(at, mask=i < R // 2, other=0.0).to(tl.float32)
    sin = tl.load(at + R // 2, mask=i < R // 2, other=0.0).to(tl.float32)
    qkv = qkv_ptr + token * ((HQ + 2 * HK) * D)
    lane = tl.arange(0, HEADS)[:, None]
    if group < Q_GROUPS:
        head = group * HEADS + lane
        _prepare_heads(
            qkv + head * D, q_ptr + token * HQ * D + head * D, head < HQ, q_weight_ptr,
            cos, sin, eps, D, R, BLOCK_HALF, BLOCK_REST, NORM, UNIT_OFFSET, INTERLEAVED, DTYPE,
        )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            head = (group - Q_GROUPS) * HEADS + lane
            key = qkv + HQ * D + head * D
            _prepare_heads(
                key, k_pool_ptr + slot * HK * D + head * D, head < HK, k_weight_ptr,
                cos, sin, eps, D, R, BLOCK_HALF, BLOCK_REST, NORM, UNIT_OFFSET, INTERLEAVED, DTYPE,
            )  # fmt: skip
            d = tl.arange(0, BLOCK_D)[None, :]
            ok = (head < HK) & (d < D)
            value = tl.load(key + HK * D + d, mask=ok, other=0.0)
            to = v_pool_ptr + slot * HK * D + head * D + d
            tl.store(to, value.to(v_pool_ptr.dtype.element_ty), mask=ok)


def check_table(cos_sin: torch.Tensor, head_dim: int) -> int:
    """The rotary dimension of a table, once it is seen to fit the heads."""
    rotary_dim = cos_sin.shape[-1]
    if rotary_dim % 2 or rotary_dim > head_dim or not cos_sin.is_contiguous():
        raise ValueError(
            f"cos_sin must be dense, its last dimension even and at most head_dim {head_dim}, "
            f"got {rotary_dim} with strides {cos_sin.stride()}"
        )
    return rotary_dim


def check_pools(
    qkv: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, num_q_heads: int
) -> None:
    """Raises ValueError where the projection and the pools do not fit."""
    tokens = qkv.shape[0]
    _, kv_heads, head_dim = k_pool.shape
    width = (num_q_heads + 2 * kv_heads) * head_dim
    if qkv.shape != (tokens, width) or not qkv.is_contiguous():
        raise ValueError(
            f"qkv must be dense [{tokens}, {width}], got {list(qkv.shape)} "
            f"with strides {qkv.stride()}"
        )
    if v_pool.shape != k_pool.shape or not (k_pool.is_contiguous() and v_pool.is_contiguous()):
        raise ValueError(
            "k_pool and v_pool must be dense and alike, got "
            f"{list(k_pool.shape)} and {list(v_pool.shape)}"
        )


def qkv_prepare_portable(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_q_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    interleaved: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`qkv_prepare_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    tokens = qkv.shape[0]
    _, kv_heads, head_dim = k_pool.shape
    check_pools(qkv, k_pool, v_pool, num_q_heads)
    if slot_mapping.shape != (tokens,) or positions.shape != (tokens,):
        raise ValueError(
            f"slot_mapping and positions must be [{tokens}], got "
            f"{list(slot_mapping.shape)} and {list(positions.shape)}"
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given together")
    rotary_dim = check_table(cos_sin, head_dim)
    shape = (tokens, num_q_heads, head_dim)
    q = torch.empty(shape, dtype=qkv.dtype, device=qkv.device) if out is None else out
    if q.shape != shape or not q.is_contiguous():
        raise ValueError(f"out must be dense {list(shape)}, got {list(q.shape)}")
    if tokens == 0:
        return q
    grid = (tokens, triton.cdiv(num_q_heads, HEADS) + triton.cdiv(kv_heads, HEADS))
    qkv_prepare_kernel[grid](
        qkv,
        positions,
        cos_sin,
        q,
        k_pool,
        v_pool,
        slot_mapping,
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        eps,
        HQ=num_q_heads,
        HK=kv_heads,
        D=head_dim,
        R=rotary_dim,
        HEADS=HEADS,
        BLOCK_HALF=triton.next_power_of_2(rotary_dim // 2),
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
        BLOCK_D=triton.next_power_of_2(head_dim),
        NORM=q_weight is not None,
        UNIT_OFFSET=unit_offset,
        INTERLEAVED=interleaved,
        num_warps=1,
    )
    return q
