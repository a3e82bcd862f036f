"""Rotary embedding: a program turns a tile of one token's heads.

A tile spans several heads so that one warp's loads of a half-head stay 128 bits wide. With a
rotary dimension below the head size the rest of a head is copied.
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
def _rotate_heads(
    x_ptr,
    out_ptr,
    head_stride,
    cos,
    sin,
    group,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    head = group * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    ok = (head < H) & (i < R // 2)
    first = i * 2 if INTERLEAVED else i
    second = first + 1 if INTERLEAVED else first + R // 2
    source = x_ptr + head * head_stride
    x1 = tl.load(source + first, mask=ok, other=0.0).to(tl.float32)
    x2 = tl.load(source + second, mask=ok, other=0.0).to(tl.float32)
    y1, y2 = turn(x1, x2, cos, sin)
    to = out_ptr + head * D
    tl.store(to + first, y1.to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(to + second, y2.to(out_ptr.dtype.element_ty), mask=ok)
    if R < D:
        rest = R + tl.arange(0, BLOCK_REST)[None, :]
        keep = (head < H) & (rest < D)
        tl.store(to + rest, tl.load(source + rest, mask=keep, other=0.0), mask=keep)


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_sin_ptr,
    positions_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    Q_GROUPS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    i = tl.arange(0, BLOCK_HALF)
    at = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * R + i
    cos = tl.load(at, mask=i < R // 2, other=0.0).to(tl.float32)
    sin = tl.load(at + R // 2, mask=i < R // 2, other=0.0).to(tl.float32)
    if group < Q_GROUPS:
        _rotate_heads(
            q_ptr + token * q_token_stride, q_out_ptr + token * HQ * D, q_head_stride, cos, sin,
            group, HQ, D, R, HEADS, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr + token * k_token_stride, k_out_ptr + token * HK * D, k_head_stride, cos, sin,
            group - Q_GROUPS, HK, D, R, HEADS, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip


def check_table(cos_sin: torch.Tensor, head_dim: int) -> int:
    """The rotary dimension of a table, once it is seen to fit the heads."""
    rotary_dim = cos_sin.shape[-1]
    if rotary_dim % 2 or rotary_dim > head_dim or not cos_sin.is_contiguous():
        raise ValueError(
            f"cos_sin must be dense, its last dimension even and at most head_dim {head_dim}, "
            f"got {rotary_dim} with strides {cos_sin.stride()}"
        )
    return rotary_dim


def rotary_portable(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    tokens, q_heads, head_dim = q.shape
    k_heads = k.shape[1]
    if k.shape != (tokens, k_heads, head_dim):
        raise ValueError(f"k must be [{tokens}, heads, {head_dim}], got {list(k.shape)}")
    rotary_dim = check_table(cos_sin, head_dim)
    if q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError("the last dimension of q and k must be dense")
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if tokens:
        rotary_kernel[(tokens, triton.cdiv(q_heads, HEADS) + triton.cdiv(k_heads, HEADS))](
            q,
            k,
            q_out,
            k_out,
            cos_sin,
            positions,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            HQ=q_heads,
            HK=k_heads,
            D=head_dim,
            R=rotary_dim,
            HEADS=HEADS,
            BLOCK_HALF=triton.next_power_of_2(rotary_dim // 2),
            BLOCK_REST=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
            INTERLEAVED=interleaved,
            num_warps=1,
        )
    return q_out, k_out
