"""Merging attention states: softmax attention over a union of disjoint sets of keys.

A state of one query and head over a set of keys is its output o (normalised within the set) and
lse = log(sum_j exp(s_j)). States over disjoint sets combine exactly and in any grouping:

    lse = log(sum_i exp(lse_i)),   o = sum_i exp(lse_i - lse) * o_i

which is how split-KV decode and cascade attention combine their parts (Milakov and Gimelshein 2018;
Ye et al. 2024, "Cascade Inference"). An empty set has lse = -inf and its o is not read, so it may
hold anything; the merge of nothing is o = 0.
"""

from typing import Any

import torch

from minisgl.kernels.op import Case, Cost, Expected, Implementation, Op


def merge_reference(
    parts: torch.Tensor,
    lse: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges S states of each of T queries and H heads.

    Args:
        parts: [S, T, H, D] floating, normalised outputs.
        lse: [S, T, H] float32 (float64 allowed), natural logarithm; -inf marks an empty state.
        out: [T, H, D] result of any floating dtype; allocated in `parts`' dtype when absent.
        out_lse: [T, H] float32 result; allocated when absent.

    Returns:
        (out, out_lse).
    """
    high = torch.promote_types(parts.dtype, lse.dtype)
    top = lse.amax(0).to(high)
    weights = torch.where(lse == -torch.inf, 0.0, (lse.to(high) - top).exp())
    total = weights.sum(0)
    live = torch.where(weights[..., None] > 0, parts.to(high), 0.0)
    merged = (live * weights[..., None]).sum(0) / total.clamp_min(1.0)[..., None]
    if out is None:
        out = torch.empty_like(parts[0])
    if out_lse is None:
        out_lse = torch.empty_like(lse[0])
    out.copy_(merged)
    out_lse.copy_(top + total.log())
    out_lse.masked_fill_(total == 0, -torch.inf)
    return out, out_lse


def merge_cost(parts: torch.Tensor, lse: torch.Tensor, **_: Any) -> Cost:
    """Every state is read once and the result written once."""
    states = parts.shape[0]
    read = parts.numel() * parts.element_size() + lse.numel() * lse.element_size()
    return Cost(bytes=read + read // states, flops=2 * parts.numel())


def _case(states: int, tokens: int, heads: int, head_dim: int) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device
        shape = (states, tokens, heads)
        parts = torch.randn(*shape, head_dim, generator=generator, device=on).to(dtype)
        lse = torch.randn(shape, generator=generator, device=on) * 8
        empty = torch.rand(shape, generator=generator, device=on) < 0.3
        empty[:, 0] = True  # nothing at all
        lse.masked_fill_(empty, -torch.inf)
        parts.masked_fill_(empty[..., None], torch.nan)
        return {"parts": parts.to(device), "lse": lse.to(device)}

    return Case(f"s{states} t{tokens} h{heads} d{head_dim}", make)


CASES = [
    _case(1, 1, 1, 64),
    _case(2, 3, 4, 64),
    _case(3, 5, 7, 80),
    _case(5, 2, 8, 96),
    _case(8, 4, 16, 128),
    _case(17, 3, 6, 256),
]

merge = Op(
    name="merge",
    reference=merge_reference,
    implementations=(
        Implementation("portable", "cuda", "minisgl.kernels.merge.portable:merge_portable"),
    ),
    cases=CASES,
    cost=merge_cost,
    variants={"portable": [_case(2, 3, 32, 128), _case(8, 3, 32, 128)]},  # with a log-sum-exp
    expected=[Expected("merge_kernel", ("load128",))],
)
