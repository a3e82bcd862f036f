"""What a user would call instead of our kernels, on the same inputs.

A baseline is given an op's arguments and returns the call to time, or None where it does not apply.
Preparation (contiguous copies of paged KV, compilation) is not timed.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minisgl.kernels.op import Op

Call = Callable[[], Any]
Baseline = Callable[[dict[str, Any]], Call | None]


def reference_of(op: Op) -> Baseline:
    """The op's own specification in eager PyTorch."""
    return lambda arguments: lambda: op.reference(**arguments)


# ---- attention ------------------------------------------------------------------------------


def dense(arguments: dict[str, Any], queries: int) -> tuple[torch.Tensor, ...]:
    """q [B, Hq, n, D], k and v [B, Hkv, L, D] of sequences that are all equally long."""
    q, table = arguments["q"], arguments["page_table"]
    page_size, length = arguments["page_size"], int(arguments["seq_lens"][0])
    j = torch.arange(length, device=q.device)
    slots = table[:, j // page_size].long() * page_size + j % page_size
    k, v = (arguments[name][slots].transpose(1, 2).contiguous() for name in ("k_pool", "v_pool"))
    return q.view(len(table), queries, *q.shape[1:]).transpose(1, 2).contiguous(), k, v


def _sdpa(backend: SDPBackend, *, decoding: bool) -> Baseline:
    def baseline(arguments: dict[str, Any]) -> Call | None:
        if arguments["q"].device.type != "cuda":
            return None
        queries = 1 if decoding else int(arguments["max_seqlen_q"])
        q, k, v = dense(arguments, queries)

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=not decoding, enable_gqa=True
                )

        return call

    return baseline


def _sdpa_default(*, decoding: bool) -> Baseline:
    def baseline(arguments: dict[str, Any]) -> Call:
        queries = 1 if decoding else int(arguments["max_seqlen_q"])
        q, k, v = dense(arguments, queries)
        return lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=not decoding, enable_gqa=True
        )

    return baseline


def _flex(arguments: dict[str, Any]) -> Call | None:
    if arguments["q"].device.type != "cuda":
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = int(arguments["max_seqlen_q"])
    q, k, v = dense(arguments, length)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, q.device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def _flashinfer_decode(arguments: dict[str, Any]) -> Call | None:
    if arguments["q"].device.type != "cuda" or not importlib.util.find_spec("flashinfer"):
        return None
    import flashinfer

    q, table, size = arguments["q"], arguments["page_table"], arguments["page_size"]
    count = -(-int(arguments["seq_lens"][0]) // size)
    pools = tuple(arguments[n].unflatten(0, (-1, size)) for n in ("k_pool", "v_pool"))
    workspace = torch.empty(2**27, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        torch.arange(len(table) + 1, dtype=torch.int32, device=q.device) * count,
        table[:, :count].flatten(),
        torch.full_like(table[:, 0], (int(arguments["seq_lens"][0]) - 1) % size + 1),
        q.shape[1],
        pools[0].shape[2],
        q.shape[2],
        size,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return lambda: wrapper.run(q, pools)


def _flash_attn(arguments: dict[str, Any]) -> Call | None:
    if arguments["q"].device.type != "cuda" or not importlib.util.find_spec("flash_attn"):
        return None
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2).contiguous() for x in dense(arguments, arguments["max_seqlen_q"]))
    return lambda: flash_attn_func(q, k, v, causal=True)


DECODE: dict[str, Baseline] = {
    "SDPA": _sdpa_default(decoding=True),
    "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION, decoding=True),
    "FlashInfer": _flashinfer_decode,
}
PREFILL: dict[str, Baseline] = {
    "SDPA": _sdpa_default(decoding=False),
    "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION, decoding=False),
    "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION, decoding=False),
    "FlexAttention": _flex,
    "flash-attn": _flash_attn,
}


# ---- the rest -------------------------------------------------------------------------------


def _norm(a: dict[str, Any]) -> Call:
    return lambda: F.rms_norm(a["x"], a["weight"].shape, a["weight"], a["eps"])


def _add_norm(a: dict[str, Any]) -> Call:
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        total = a["x"] + a["residual"]
        return F.rms_norm(total, a["weight"].shape, a["weight"], a["eps"]), total

    return call


def _activation(a: dict[str, Any]) -> Call:
    def call() -> torch.Tensor:
        gate, up = a["x"].chunk(2, dim=-1)
        return F.silu(gate) * up

    return call


def _index_copy(a: dict[str, Any]) -> Call:
    slots = a["slot_mapping"].long()

    def call() -> None:
        a["k_pool"].index_copy_(0, slots, a["k"])
        a["v_pool"].index_copy_(0, slots, a["v"])

    return call


def _matmul(a: dict[str, Any]) -> Call:
    return lambda: F.linear(a["x"], a["weight"])


def sampling(fields: dict[str, float]) -> dict[str, Baseline]:
    """argmax, or softmax with a sorted filter where one is on, and torch.multinomial."""

    def baseline(a: dict[str, Any]) -> Call:
        logits = a["logits"]
        temperature = fields["temperature"]
        if temperature == 0:
            return lambda: logits.argmax(dim=1)

        def call() -> torch.Tensor:
            probabilities = torch.softmax(logits / temperature, dim=1)
            if "top_p" in fields:
                ordered, ids = probabilities.sort(dim=1, descending=True)
                ordered[ordered.cumsum(dim=1) - ordered > fields["top_p"]] = 0.0
                ordered[:, int(fields.get("top_k", logits.shape[1])) :] = 0.0
                return ids.gather(1, torch.multinomial(ordered, 1))
            return torch.multinomial(probabilities, 1)

        return call

    return {"argmax" if fields["temperature"] == 0 else "softmax, multinomial": baseline}


NORM: dict[str, Baseline] = {"F.rms_norm": _norm}
ADD_NORM: dict[str, Baseline] = {"add, F.rms_norm": _add_norm}
ACTIVATION: dict[str, Baseline] = {"F.silu, mul": _activation}
WRITE_KV: dict[str, Baseline] = {"index_copy_": _index_copy}
LINEAR: dict[str, Baseline] = {"F.linear": _matmul}
