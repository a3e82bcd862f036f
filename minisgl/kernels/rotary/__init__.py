"""Rotary position embedding of queries and keys, from a table of cosines and sines.

For rotary dimension R <= D and position p, with c = table[p, :R/2] and s = table[p, R/2:]:

    half-split:   (x1, x2) = (x[:R/2], x[R/2:R])     pairs lie R/2 apart (Llama, Qwen, Gemma)
    interleaved:  (x1, x2) = (x[0:R:2], x[1:R:2])    pairs are neighbours (GPT-J)
    rotated pair: (x1 c - x2 s, x2 c + x1 s)         dimensions from R on pass through

computed in fp32 and rounded once. What a checkpoint's rope scaling asks for is in the table.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from typing import Any

import torch

from minisgl.kernels.op import Case, Cost, Implementation, Op


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


def rotary_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q [T, Hq, D] and k [T, Hkv, D], dense in the last dimension, else strided at will.

    cos_sin: [max_position, R] fp32, R even. positions: [T] integers below max_position. Returns
    new dense tensors; no argument is written to.
    """
    return (
        rotate(q, cos_sin, positions, interleaved).to(q.dtype),
        rotate(k, cos_sin, positions, interleaved).to(k.dtype),
    )


def rotary_cost(q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor, **_: Any) -> Cost:
    elements = q.numel() + k.numel()
    table = q.shape[0] * cos_sin.shape[-1] * cos_sin.element_size()
    return Cost(bytes=2 * elements * q.element_size() + table, flops=3 * elements)


def plain_table(max_position: int, rotary_dim: int, base: float = 10000.0) -> torch.Tensor:
    """The unscaled table [max_position, rotary_dim] fp32, for cases and tests."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.arange(max_position, dtype=torch.float64)[:, None] * base**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def _case(
    tokens: int, q_heads: int, kv_heads: int, head_dim: int, rotary_dim: int, interleaved: bool
) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device
        heads = q_heads + 2 * kv_heads
        qkv = torch.randn(tokens, heads, head_dim, generator=generator, device=on)
        qkv = qkv.to(device, dtype)
        positions = torch.randint(0, 301, (tokens,), generator=generator, device=on)
        return {
            "q": qkv[:, :q_heads],
            "k": qkv[:, q_heads : q_heads + kv_heads],
            "cos_sin": plain_table(301, rotary_dim).to(device),
            "positions": positions.to(device),
            "interleaved": interleaved,
        }

    label = f"T{tokens}-Hq{q_heads}-Hkv{kv_heads}-D{head_dim}-R{rotary_dim}"
    return Case(label + ("-interleaved" if interleaved else ""), make)


CASES = (
    _case(1, 4, 2, 128, 128, False),
    _case(33, 3, 1, 64, 64, False),
    _case(7, 6, 2, 80, 80, False),
    _case(5, 4, 4, 96, 96, True),
    _case(9, 4, 1, 256, 64, False),
    _case(3, 2, 2, 128, 32, True),
)

rotary = Op(
    "rotary",
    rotary_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.rotary.portable:rotary_portable")
    ],
    cases=CASES,
    cost=rotary_cost,
)
