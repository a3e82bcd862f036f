"""Decode attention by the CPU's native ops.

A query's result depends on its own keys alone, bit for bit: not on the queries beside it, so any
number of consecutive queries of a sequence may go together.
"""

from types import ModuleType

import torch

from minisgl.device.tape import empty
from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.native import address, model_ops


def attention_ops(q: torch.Tensor, kv: PagedKV, out: torch.Tensor | None) -> ModuleType | None:
    """The native module, if it is built and reads and writes these tensors as they lie."""
    native = model_ops(q, kv.k_pool, kv.v_pool, out)
    dense = q.stride(1) == q.shape[2] and q.stride(2) == 1 and kv.page_table.stride(1) == 1
    dense = dense and (out is None or out.is_contiguous())
    return native if native and dense and q.shape[2] in native.HEAD_DIMS else None


def decode_native(
    q: torch.Tensor,
    kv: PagedKV,
    *,
    width: int,
    return_lse: bool,
    out: torch.Tensor | None,
    groups: torch.Tensor | None = None,
    shared: torch.Tensor | None = None,
) -> Attended | None:
    """See `decode_reference`, with groups `cascade_reference`. None where the native ops are not
    built or do not cover the call."""
    tokens, num_heads, head_dim = q.shape
    native = attention_ops(q, kv, out)
    if native is None:
        return None
    if out is None:
        out = empty(q.shape, q.dtype)
    lse = empty((tokens, num_heads), torch.float32) if return_lse else None
    native.decode(
        q.data_ptr(),
        q.stride(0),
        kv.k_pool.data_ptr(),
        kv.v_pool.data_ptr(),
        kv.page_table.data_ptr(),
        kv.page_table.stride(0),
        kv.rows.data_ptr(),
        kv.seq_lens.data_ptr(),
        address(groups),
        address(shared),
        out.data_ptr(),
        address(lse),
        kv.seq_lens.shape[0],
        0 if groups is None else groups.shape[0],
        width,
        num_heads,
        kv.k_pool.shape[1],
        head_dim,
        kv.page_size,
        kv.scale,
        kv.window or 0,
        kv.softcap or 0.0,
        q.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out if lse is None else (out, lse)
