"""Experts on CPU: the reference's grouping, with the CPU's own linear layers and activations."""

import torch

from minisgl.device.tape import by_call
from minisgl.kernels.activation.cpu import gelu_tanh_and_mul_cpu, silu_and_mul_cpu
from minisgl.kernels.linear.cpu import linear_cpu

ACTIVATIONS = {"silu": silu_and_mul_cpu, "gelu_tanh": gelu_tanh_and_mul_cpu}


@by_call
def moe_experts_cpu(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """See `moe_experts_reference`. A token's experts are added in ascending order of their ids."""
    num_experts, top_k = gate_up.shape[0], ids.shape[1]
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    chosen, counts = torch.unique_consecutive(flat[order], return_counts=True)
    output = torch.zeros(x.shape, dtype=torch.float32)
    act = ACTIVATIONS[activation]
    start = 0
    for expert, count in zip(chosen.tolist(), counts.tolist(), strict=True):
        pairs = order[start : start + count]
        start += count
        if not 0 <= expert < num_experts:
            continue
        tokens = pairs // top_k
        hidden = act(linear_cpu(x[tokens], gate_up[expert]))
        y = linear_cpu(hidden, down[expert], wide=True)
        output.index_add_(0, tokens, y * weights.flatten()[pairs, None])
    return output.to(x.dtype)
