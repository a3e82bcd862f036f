"""Merge of attention states: one program per token and tile of heads.

A program reads the log-sum-exps of all states at once, and then the outputs of several states
together, so that many loads are on their way. The order of additions depends on shapes alone.
"""

import torch
import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["lse_stride"], do_not_specialize_on_alignment=["lse_ptr", "out_lse_ptr"]
)
def merge_kernel(
    parts_ptr,  # [S, T, H, D]
    lse_ptr,  # [S, T, H]
    out_ptr,  # [T, H, D]
    out_lse_ptr,  # [T, H]
    state_stride,  # of parts, in elements
    lse_stride,
    out_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WRITE_LSE: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    head_ok = head < H
    at = token * H + head
    s = tl.arange(0, BLOCK_S)[:, None]
    there = (s < S) & head_ok[None, :]
    lse = tl.load(lse_ptr + s.to(tl.int64) * lse_stride + at, mask=there, other=float("-inf"))
    top = tl.max(lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2((lse - shift) * LOG2E), 0)
    added = tl.zeros([TILE_S, BLOCK_H, BLOCK_D], tl.float32)
    for first in range(0, S, TILE_S):
        t = (first + tl.arange(0, TILE_S))[:, None]
        known = (t < S) & head_ok[None, :]
        its = tl.load(lse_ptr + t.to(tl.int64) * lse_stride + at, mask=known, other=float("-inf"))
        weight = tl.exp2((its - shift) * LOG2E)
        # An empty state's output is never read: it may hold anything.
        live = (weight > 0.0)[:, :, None] & (d < D)
        source = t.to(tl.int64)[:, :, None] * state_stride + at[:, None] * D + d
        part = tl.load(parts_ptr + source, mask=live, other=0.0).to(tl.float32)
        added += part * weight[:, :, None]
    merged = tl.sum(added, 0)
    divisor = tl.where(total > 0.0, total, 1.0)
    ok = head_ok[:, None] & (d < D)[None, :]
    out = merged / divisor[:, None]
    to = out_ptr + token * out_stride + head[:, None] * D + d[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=ok)
    if WRITE_LSE:
        out_lse = tl.where(total > 0.0, shift + tl.log2(divisor) * LN2, float("-inf"))
        tl.store(out_lse_ptr + at, out_lse, mask=head_ok)


def merge_portable(
    parts: torch.Tensor,
    lse: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_reference` on a GPU. Raises ValueError for shapes or layouts that do not fit."""
    states, tokens, heads, head_dim = parts.shape
    if lse.shape != (states, tokens, heads):
        raise ValueError(f"lse must be {(states, tokens, heads)}, got {tuple(lse.shape)}")
    if not (parts[0].is_contiguous() and lse[0].is_contiguous()):
        raise ValueError("the states of parts and lse must each be contiguous")
    if out is None:
        out = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)
    elif out.shape != parts.shape[1:] or out.stride()[1:] != (head_dim, 1):
        raise ValueError(f"out must be {list(parts.shape[1:])}, dense in its last two dimensions")
    if out_lse is None:
        out_lse = torch.empty(lse.shape[1:], dtype=torch.float32, device=lse.device)
    launch_merge(parts, lse, out, out_lse)
    return out, out_lse


def launch_merge(
    parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, out_lse: torch.Tensor | None
) -> None:
    """Launches the merge; with no `out_lse`, only the outputs are written."""
    states, tokens, heads, head_dim = parts.shape
    if tokens == 0:
        return
    block_h, block_d = min(8, triton.next_power_of_2(heads)), triton.next_power_of_2(head_dim)
    block_s = triton.next_power_of_2(states)
    merge_kernel[(tokens, triton.cdiv(heads, block_h))](
        parts,
        lse,
        out,
        lse if out_lse is None else out_lse,
        parts.stride(0),
        lse.stride(0),
        out.stride(0),
        H=heads,
        D=head_dim,
        S=states,
        BLOCK_S=block_s,
        TILE_S=max(1, min(block_s, 8192 // (block_h * block_d))),  # 64 numbers to a thread
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        WRITE_LSE=out_lse is not None,
        num_warps=min(4, max(1, block_h * block_d // 128)),  # four elements to a thread, or more
    )
