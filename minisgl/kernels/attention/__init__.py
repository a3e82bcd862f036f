"""Causal attention of chunks of queries over paged keys and values.

Sequence s has n queries, tokens cu_seqlens_q[s] to cu_seqlens_q[s + 1] of q, and L = seq_lens[s]
keys, its own n last among them. Query t stands at position i = L - n + t and sees key j when

    j <= i,  and i - j < window where there is one.

    x_ij = scale * q_i . k_j,   softcap * tanh(x_ij / softcap) where there is one
    o_i  = sum_j softmax_j(x_ij) v_j,   lse_i = log sum_j exp(x_ij)

`PagedKV` says where key j lies. Query head h reads key head h // (Hq / Hkv). Sources: Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023; Dao,
"FlashAttention-2", 2023; the soft cap from "Gemma 2: Improving Open Language Models at a Practical
Size", 2024.
"""

import math
from typing import Any

import torch

from minisgl.kernels.attention.paged import Attended, PagedKV, paged_case, visible_pairs
from minisgl.kernels.op import Case, Cost, Expected, Implementation, Op


def attention_reference(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """Returns out [T, Hq, D] in q's dtype, and lse [T, Hq] fp32 (natural log) if asked for.

    q: [T, Hq, D], dense in its last two dimensions; T may exceed cu_seqlens_q[S], the rest of the
    output is then left as it is. cu_seqlens_q: [S + 1] int32. max_seqlen_q: an upper bound on n,
    which sizes a launch; it changes no result. A query that sees no key (seq_lens = 0, or more
    queries than keys) gives 0 and lse -inf. `out` receives the result when given.
    """
    groups = q.shape[1] // kv.k_pool.shape[1]
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    offsets = cu_seqlens_q.tolist()
    for s, (row, length) in enumerate(zip(kv.rows.tolist(), kv.seq_lens.tolist(), strict=True)):
        start, end = offsets[s], offsets[s + 1]
        j = torch.arange(length, device=q.device)
        i = length - (end - start) + torch.arange(end - start, device=q.device)[:, None]
        pages = kv.page_table[row, j // kv.page_size].long()
        slots = pages * kv.page_size + j % kv.page_size
        keys = kv.k_pool[slots].float().repeat_interleave(groups, dim=1)  # [L, Hq, D]
        values = kv.v_pool[slots].float().repeat_interleave(groups, dim=1)
        x = torch.einsum("qhd,khd->qhk", q[start:end].float(), keys) * kv.scale
        if kv.softcap is not None:
            x = kv.softcap * torch.tanh(x / kv.softcap)
        visible = j <= i
        if kv.window is not None:
            visible &= i - j < kv.window
        x = x.masked_fill(~visible[:, None], -math.inf)
        lse[start:end] = torch.logsumexp(x, dim=-1)
        weights = torch.softmax(x, dim=-1).nan_to_num(0.0)  # no visible key: 0, not 0 / 0
        out[start:end] = torch.einsum("qhk,khd->qhd", weights, values).to(out.dtype)
    return (out, lse) if return_lse else out


def attention_cost(q: torch.Tensor, kv: PagedKV, cu_seqlens_q: torch.Tensor, **_: Any) -> Cost:
    widths = cu_seqlens_q.diff().tolist()
    pairs = keys = 0
    for n, length in zip(widths, kv.seq_lens.tolist(), strict=True):
        pairs += visible_pairs(n, length, kv.window)
        keys += length if kv.window is None else min(length, kv.window + n - 1)
    moved = 2 * keys * kv.k_pool[0].numel() * kv.k_pool.element_size()
    head_dim = q.shape[-1]
    return Cost(
        bytes=2 * q.numel() * q.element_size() + moved, flops=4 * pairs * q.shape[1] * head_dim
    )


def _case(label: str, queries: list[int], lengths: list[int], **facts: Any) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        arguments = paged_case(sum(queries), lengths, device, dtype, generator, **facts)
        offsets = torch.tensor([0, *queries]).cumsum(0).int().to(device)
        return arguments | {"cu_seqlens_q": offsets, "max_seqlen_q": max(queries)}

    return Case(label, make)


CASES = (
    _case("prefill-D64", [1, 63, 65], [1, 63, 65], head_dim=64, q_heads=4, kv_heads=2),
    _case("chunks-D128", [33, 7, 64], [130, 300, 64], head_dim=128, q_heads=6, kv_heads=2),
    _case("chunks-D80-page1", [17, 5], [70, 65], head_dim=80, page_size=1),
    _case("chunks-D96-page64", [17, 40], [129, 40], head_dim=96, page_size=64),
    _case("chunks-D256-gqa8", [9, 31], [64, 95], head_dim=256, q_heads=8, kv_heads=1),
    _case("window-D128", [30, 20], [130, 20], head_dim=128, window=24, page_size=32),
    _case("window1-D64", [5, 3], [70, 3], head_dim=64, window=1),
    _case("softcap-D128", [21, 64], [80, 64], head_dim=128, softcap=5.0, q_heads=4, kv_heads=4),
    _case("window-softcap-D256", [33], [100], head_dim=256, window=64, softcap=20.0),
    _case("no-keys", [3, 2, 1], [0, 1, 5], head_dim=64),
    _case("empty-sequence", [0, 4], [12, 4], head_dim=128),
    _case("lse-D128", [10, 66], [75, 66], head_dim=128, return_lse=True),
)


def _unserved(label: str, dtype: torch.dtype, page_size: int = 16, **facts: Any) -> Case:
    """With the heads of a large model; rows of its page table are 16 long, as aligned ones are."""
    facts |= {"head_dim": 128, "q_heads": 32, "kv_heads": 8, "page_size": page_size}
    case = _case(label, [14 * page_size] * 4, [14 * page_size] * 4, **facts)
    return Case(label, lambda device, _, generator: case.make(device, dtype, generator))


def hopper_refusal(
    head_dim: int, dtype: torch.dtype, page_size: int, window: int | None, softcap: float | None
) -> str | None:
    """Why the Gluon kernel cannot serve such attention, "needs ..., got ..."; None if it can."""
    if head_dim != 128:
        return f"needs head_dim 128, got {head_dim}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs dtype bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if page_size < 16:
        return f"needs a page_size of at least 16, got {page_size}"
    if window is not None:
        return f"needs attention without a sliding window, got one of {window} tokens"
    if softcap is not None:
        return f"needs attention scores without a soft cap, got one of {softcap}"
    return None


def _refusal(q: torch.Tensor, kv: PagedKV, **_: Any) -> str | None:
    return hopper_refusal(q.shape[2], q.dtype, kv.page_size, kv.window, kv.softcap)


_HOPPER = "minisgl.kernels.attention.hopper:attention_hopper"
attention = Op(
    "attention",
    attention_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.attention.portable:attention_portable"),
        # Behind the portable one until it has passed on a GPU; chosen by --attention-backend gluon.
        Implementation("hopper", "cuda", _HOPPER, (9, 0), _refusal),
        Implementation("cpu", "cpu", "minisgl.kernels.attention.cpu:attention_cpu"),
    ],
    cases=CASES,
    cost=attention_cost,
    variants={
        "portable": [_unserved("lse", torch.bfloat16, return_lse=True)],
        "hopper": [
            _unserved("page16", torch.bfloat16),
            _unserved("page64", torch.bfloat16, 64),
            _unserved("fp16-lse", torch.float16, return_lse=True),
        ],
    },
    expected=[
        Expected("attention_kernel", ("load128", "wgmma")),
        Expected("attention_hopper_kernel", ("wgmma", "tma", "set_registers")),
    ],
)
