"""Everything between the fused QKV projection and attention, as one op.

Splits the projection, normalises queries and keys per head (Qwen3, Gemma 3), rotates them, writes
keys and values into this layer's pool and returns the queries. The projection is read once;
arithmetic is in fp32 with one rounding at the end.

Rotary embedding of a head x at position p, for rotary dimension R <= D, with c = table[p, :R/2]
and s = table[p, R/2:]:

    half-split:   (x1, x2) = (x[:R/2], x[R/2:R])     pairs lie R/2 apart (Llama, Qwen, Gemma)
    interleaved:  (x1, x2) = (x[0:R:2], x[1:R:2])    pairs are neighbours (GPT-J)
    rotated pair: (x1 c - x2 s, x2 c + x1 s)         dimensions from R on pass through

What a checkpoint's rope scaling asks for is in the table. Source: Su et al., "RoFormer: Enhanced
Transformer with Rotary Position Embedding", 2021.
"""

from typing import Any

import torch

from minisgl.kernels.op import WIDE, Case, Cost, Expected, Implementation, Op
from minisgl.kernels.rmsnorm import rmsnorm_reference


def rotate(
    x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """`x` [T, heads, D] rotated by `positions` [T], in fp32."""
    table = cos_sin[positions].float()[:, None]  # [T, 1, R]
    cos, sin = table.chunk(2, dim=-1)
    rotary_dim = table.shape[-1]
    turned, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:].float()
    if interleaved:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    else:
        x1, x2 = turned.chunk(2, dim=-1)
        turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


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
    kept = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[kept].long()
    k_pool[slots] = k[kept].to(qkv.dtype).to(k_pool.dtype)
    v_pool[slots] = v[kept].to(qkv.dtype).to(v_pool.dtype)
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


def plain_table(max_position: int, rotary_dim: int, base: float = 10000.0) -> torch.Tensor:
    """The unscaled table [max_position, rotary_dim] fp32, for cases and tests."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.arange(max_position, dtype=torch.float64)[:, None] * base**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


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
    _case(3, 2, 2, 128, rotary_dim=32, interleaved=True),
    _case(0, 4, 2, 64),
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
    expected=[
        # Heads in halves that are no power of two leave lanes idle and may load less at once.
        Expected(
            "qkv_prepare_kernel", WIDE, lambda facts: facts["R"] == facts["D"] in (64, 128, 256)
        )
    ],
)
