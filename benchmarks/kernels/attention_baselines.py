"""What a user would call for attention instead of our kernels, on the same inputs.

SDPA and flash-attn read a dense copy of the KV, made outside of the time; FlashInfer reads the
pages themselves. FlexAttention is left out: it compiles for seconds at every shape.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.workload import Arguments, Baseline, Call
from minisgl.kernels.decode import decode


def dense(arguments: Arguments, queries: int) -> tuple[torch.Tensor, ...]:
    """q [B, Hq, n, D], k and v [B, Hkv, L, D] of sequences that are all equally long."""
    q, kv = arguments["q"], arguments["kv"]
    table, page_size, length = kv.page_table, kv.page_size, int(kv.seq_lens[0])
    j = torch.arange(length, device=q.device)
    slots = table[:, j // page_size].long() * page_size + j % page_size
    k, v = (pool[slots].transpose(1, 2).contiguous() for pool in (kv.k_pool, kv.v_pool))
    return q.view(len(table), queries, *q.shape[1:]).transpose(1, 2).contiguous(), k, v


def _queries(arguments: Arguments) -> int:
    return int(arguments.get("max_seqlen_q", 1))


def _on_gpu(arguments: Arguments, package: str | None = None) -> bool:
    found = package is None or importlib.util.find_spec(package) is not None
    return found and arguments["q"].device.type == "cuda"


def _sdpa(arguments: Arguments) -> Call:
    n = _queries(arguments)
    q, k, v = dense(arguments, n)
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=True)


def _backend(backend: SDPBackend) -> Baseline:
    def baseline(arguments: Arguments) -> Call | None:
        if not _on_gpu(arguments):
            return None
        n = _queries(arguments)
        q, k, v = dense(arguments, n)

        def call(gqa: bool = True) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=gqa)

        try:
            call()
        except RuntimeError:  # a backend without grouped heads is given as many as q has
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            return lambda: call(gqa=False)
        return call

    return baseline


def _extend(arguments: Arguments) -> Call | None:
    """The last n of L queries: causal in the lower right corner."""
    if not _on_gpu(arguments):
        return None
    from torch.nn.attention.bias import causal_lower_right

    n = _queries(arguments)
    q, k, v = dense(arguments, n)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = causal_lower_right(n, k.shape[2])
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _flashinfer_decode(arguments: Arguments) -> Call | None:
    if not _on_gpu(arguments, "flashinfer"):
        return None
    import flashinfer

    q, kv = arguments["q"], arguments["kv"]
    table, size, length = kv.page_table, kv.page_size, int(kv.seq_lens[0])
    count = -(-length // size)
    pools = tuple(pool.unflatten(0, (-1, size)) for pool in (kv.k_pool, kv.v_pool))
    heads, kv_heads = q.shape[1], pools[0].shape[2]
    workspace = torch.empty(2**28, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=heads >= 4 * kv_heads
    )
    wrapper.plan(
        torch.arange(len(table) + 1, dtype=torch.int32, device=q.device) * count,
        table[:, :count].flatten(),
        torch.full_like(table[:, 0], (length - 1) % size + 1),
        heads,
        kv_heads,
        q.shape[2],
        size,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return lambda: wrapper.run(q, pools)


def _flash_attn(arguments: Arguments) -> Call | None:
    if not _on_gpu(arguments, "flash_attn"):
        return None
    from flash_attn import flash_attn_func, flash_attn_with_kvcache

    n = _queries(arguments)
    q, k, v = (x.transpose(1, 2).contiguous() for x in dense(arguments, n))
    if n > 1:
        return lambda: flash_attn_func(q, k, v, causal=True)
    return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=arguments["kv"].seq_lens)


def plain_decode(arguments: Arguments) -> Call:
    """Our own decode, which reads a group's shared keys once per sequence."""
    return lambda: decode(arguments["q"], arguments["kv"])


_BACKENDS = {
    "SDPA flash": _backend(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": _backend(SDPBackend.CUDNN_ATTENTION),
}
DECODE: dict[str, Baseline] = {
    "SDPA": _sdpa,
    **_BACKENDS,
    "FlashInfer": _flashinfer_decode,
    "flash-attn": _flash_attn,
}
PREFILL: dict[str, Baseline] = {"SDPA": _sdpa, **_BACKENDS, "flash-attn": _flash_attn}
EXTEND: dict[str, Baseline] = {"SDPA, dense prefix": _extend}
