"""Decode attention by the CPU's native ops.

A query's result depends on its own keys alone, bit for bit: not on the queries beside it, so any
number of consecutive queries of a sequence may go together.
"""

import torch

from minisgl.kernels.native import address, model_ops


def decode_native(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    width: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
    """See `decode_reference`. None where the native ops are not built or do not cover the call."""
    tokens, num_heads, head_dim = q.shape
    native = model_ops(q, k_pool, v_pool, out)
    dense = q.stride(1) == head_dim and q.stride(2) == 1 and page_table.stride(1) == 1
    dense = dense and (out is None or out.is_contiguous())
    if native is None or not dense or head_dim not in native.DECODE_HEAD_DIMS:
        return None
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(tokens, num_heads, dtype=torch.float32) if return_lse else None
    native.decode(
        q.data_ptr(),
        q.stride(0),
        k_pool.data_ptr(),
        v_pool.data_ptr(),
        page_table.data_ptr(),
        page_table.stride(0),
        rows.data_ptr(),
        seq_lens.data_ptr(),
        out.data_ptr(),
        address(lse),
        seq_lens.shape[0],
        width,
        num_heads,
        k_pool.shape[1],
        head_dim,
        page_size,
        scale,
        window or 0,
        softcap or 0.0,
        q.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out if lse is None else (out, lse)
