"""Everything between the fused QKV projection and attention, as one op.

Splits the projection, normalises queries and keys per head (Qwen3, Gemma 3), rotates them, writes
keys and values into this layer's pool and returns the queries. It is `rmsnorm`, `rotary` and
`write_kv` composed in fp32 with one rounding at the end; fused, the projection is read once.
"""

from typing import Any

import torch

from minisgl.kernels.kv_copy import write_kv_reference
from minisgl.kernels.op import Case, Cost, Implementation, Op
from minisgl.kernels.rmsnorm import rmsnorm_reference
from minisgl.kernels.rotary import plain_table, rotate


def qkv_prepare_reference(
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
    """Returns q [T, Hq, D] ready for attention, dense; writes the pools in place.

    qkv: [T, (Hq + 2 Hkv) D], dense, queries first, then keys, then values. k_pool, v_pool:
    [slots, Hkv, D]. slot_mapping: [T], -1 skips the token's KV. positions: [T]. cos_sin:
    [max_position, R] fp32. q_weight, k_weight: [D], both or neither, with the meaning of
    `rmsnorm`'s weight, eps and unit_offset. `out` receives q when given.
    """
    _, num_kv_heads, head_dim = k_pool.shape
    heads = qkv.unflatten(-1, (num_q_heads + 2 * num_kv_heads, head_dim)).float()
    q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None and k_weight is not None:
        q = rmsnorm_reference(q, q_weight, eps, unit_offset=unit_offset)
        k = rmsnorm_reference(k, k_weight, eps, unit_offset=unit_offset)
    k = rotate(k, cos_sin, positions, interleaved)
    write_kv_reference(k.to(qkv.dtype), v.to(qkv.dtype), k_pool, v_pool, slot_mapping)
    q = rotate(q, cos_sin, positions, interleaved).to(qkv.dtype)
    return q if out is None else out.copy_(q)


def qkv_prepare_cost(
    qkv: torch.Tensor, k_pool: torch.Tensor, cos_sin: torch.Tensor, num_q_heads: int, **_: Any
) -> Cost:
    tokens = qkv.shape[0]
    head_dim = k_pool.shape[-1]
    read = qkv.numel() * qkv.element_size() + tokens * cos_sin.shape[-1] * cos_sin.element_size()
    written = tokens * (
        num_q_heads * head_dim * qkv.element_size() + 2 * k_pool[0].numel() * k_pool.element_size()
    )
    return Cost(bytes=read + written, flops=8 * qkv.numel())


def _case(
    tokens: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    rotary_dim: int | None = None,
    norm: bool = True,
    unit_offset: bool = False,
    interleaved: bool = False,
    out: bool = False,
) -> Case:
    rotary_dim = rotary_dim or head_dim

    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=on).to(device, dtype)

        slots = 2 * tokens + 3
        mapping = torch.randperm(slots, generator=generator, device=on)[:tokens]
        mapping[1::4] = -1
        pool = torch.full((slots, kv_heads, head_dim), torch.nan, device=device).to(dtype)
        q = torch.full((tokens, q_heads, head_dim), torch.nan, device=device).to(dtype)
        return {
            "qkv": normal(tokens, (q_heads + 2 * kv_heads) * head_dim),
            "positions": torch.randint(0, 301, (tokens,), generator=generator, device=on).to(
                device
            ),
            "cos_sin": plain_table(301, rotary_dim).to(device),
            "k_pool": pool,
            "v_pool": pool.clone(),
            "slot_mapping": mapping.to(device),
            "num_q_heads": q_heads,
            "q_weight": normal(head_dim) if norm else None,
            "k_weight": normal(head_dim) if norm else None,
            "eps": 1e-6,
            "unit_offset": unit_offset,
            "interleaved": interleaved,
            "out": q if out else None,
        }

    label = f"T{tokens}-Hq{q_heads}-Hkv{kv_heads}-D{head_dim}-R{rotary_dim}"
    marks = {"norm": norm, "unit_offset": unit_offset, "interleaved": interleaved, "out": out}
    return Case("-".join([label, *(mark for mark, on in marks.items() if on)]), make)


CASES = (
    _case(1, 16, 8, 128),
    _case(33, 3, 1, 64, norm=False),
    _case(5, 4, 2, 256, unit_offset=True),
    _case(7, 6, 2, 80, rotary_dim=32),
    _case(9, 4, 4, 96, norm=False, interleaved=True),
    _case(3, 5, 1, 64, out=True),
)

qkv_prepare = Op(
    "qkv_prepare",
    qkv_prepare_reference,
    implementations=[
        Implementation(
            "portable", "cuda", "minisgl.kernels.qkv_prepare.portable:qkv_prepare_portable"
        ),
        Implementation("cpu", "cpu", "minisgl.kernels.qkv_prepare.cpu:qkv_prepare_cpu"),
    ],
    cases=CASES,
    cost=qkv_prepare_cost,
)
