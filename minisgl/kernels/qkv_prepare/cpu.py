"""Split, norm, rotary and KV write on CPU, token by token in one pass."""

import torch

from minisgl.device.tape import by_call, empty
from minisgl.kernels.native import address, model_ops
from minisgl.kernels.qkv_prepare import qkv_prepare_reference

qkv_prepare_by_call = by_call(qkv_prepare_reference)  # it reads which tokens have a slot


def qkv_prepare_cpu(
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
    """See `qkv_prepare_reference`."""
    native = model_ops(qkv, k_pool, v_pool, q_weight, k_weight)
    tensors = (qkv, cos_sin, k_pool, v_pool, q_weight, k_weight, out)
    if native is None or not all(t is None or t.is_contiguous() for t in tensors):
        return qkv_prepare_by_call(
            qkv,
            positions,
            cos_sin,
            k_pool,
            v_pool,
            slot_mapping,
            num_q_heads,
            q_weight,
            k_weight,
            eps,
            unit_offset,
            interleaved,
            out,
        )
    tokens = qkv.shape[0]
    _, num_kv_heads, head_dim = k_pool.shape
    positions, slots = dense_int64(positions), dense_int64(slot_mapping)
    q = empty((tokens, num_q_heads, head_dim), qkv.dtype) if out is None else out
    native.qkv_prepare(
        qkv.data_ptr(),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        k_pool.data_ptr(),
        v_pool.data_ptr(),
        slots.data_ptr(),
        address(q_weight),
        address(k_weight),
        q.data_ptr(),
        tokens,
        num_q_heads,
        num_kv_heads,
        head_dim,
        cos_sin.shape[1],
        eps,
        unit_offset,
        interleaved,
        qkv.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return q


def dense_int64(x: torch.Tensor) -> torch.Tensor:
    """`x` itself, as it mostly is, without asking PyTorch."""
    return x if x.dtype == torch.int64 and x.is_contiguous() else x.long().contiguous()
