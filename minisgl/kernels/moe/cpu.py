"""Mixtures of experts on CPU: csrc/cpu/moe.cpp, for experts in panels; and the reference's grouping
with the CPU's own linear layers and activations."""

import torch

from minisgl.device.tape import by_call, empty
from minisgl.kernels.activation.cpu import gelu_tanh_and_mul_cpu, silu_and_mul_cpu
from minisgl.kernels.grouped_linear.cpu import grouped_linear_cpu
from minisgl.kernels.linear.cpu import linear_cpu
from minisgl.kernels.linear.panels import Panels, unpacked
from minisgl.kernels.matrix import Matrix, Quantized
from minisgl.kernels.moe import moe_route_reference
from minisgl.kernels.native import model_ops

ACTIVATIONS = {"silu": silu_and_mul_cpu, "gelu_tanh": gelu_tanh_and_mul_cpu}


def moe_route_cpu(
    logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_route_reference`."""
    tokens, experts = logits.shape
    native = model_ops(logits)
    if native is None or logits.stride(1) != 1 or not 1 <= top_k <= experts:
        return moe_route_twin(logits, top_k, renormalize)
    weights = empty((tokens, top_k), torch.float32)
    ids = empty((tokens, top_k), torch.int32)
    addresses = (logits.data_ptr(), logits.stride(0), weights.data_ptr(), ids.data_ptr())
    how = (renormalize, logits.dtype == torch.bfloat16, torch.get_num_threads())
    native.moe_route(*addresses, tokens, experts, top_k, *how)
    return weights, ids


moe_route_twin = by_call(moe_route_reference)


def moe_experts_cpu(
    x: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """See `moe_experts_reference`; with panels a token's result does not depend on the others."""
    if not (isinstance(gate_up, Panels) and isinstance(down, Panels)):
        return moe_experts_twin(x, gate_up, down, weights, ids, activation)
    native = model_ops(x, gate_up.values, down.values)
    (tokens, top_k), (experts, hidden, inner) = ids.shape, down.shape
    shapes = (*x.shape, *weights.shape, *gate_up.shape)
    fits = shapes == (tokens, hidden, tokens, top_k, experts, 2, inner, hidden)
    fits = fits and all(tensor.is_contiguous() for tensor in (x, weights, ids))
    if native is None or not fits:
        return moe_experts_twin(x, gate_up, down, weights, ids, activation)
    middle, parts = (empty((tokens * top_k, width), x.dtype) for width in (inner, hidden))
    out = empty((tokens, hidden), x.dtype)
    tensors = (gate_up.values, down.values, weights, ids, middle, parts, out)
    addresses = (x.data_ptr(), x.stride(0), *(tensor.data_ptr() for tensor in tensors))
    sizes = (tokens, experts, top_k, hidden, inner)
    native.moe_experts(*addresses, *sizes, activation == "gelu_tanh", torch.get_num_threads())
    return out


@by_call
def moe_experts_twin(
    x: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """The same for weights as they are, or in codes. A token's experts are added in ascending order
    of ids."""
    num_experts, top_k = gate_up.shape[0], ids.shape[1]
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    chosen, counts = torch.unique_consecutive(flat[order], return_counts=True)
    output = torch.zeros(x.shape, dtype=torch.float32)
    for expert, pairs in zip(chosen.tolist(), order.split(counts.tolist()), strict=True):
        if not 0 <= expert < num_experts:
            continue
        tokens = pairs // top_k
        hidden = ACTIVATIONS[activation](_product(x[tokens], gate_up, expert))
        y = _product(hidden, down, expert, wide=True)
        output.index_add_(0, tokens, y * weights.flatten()[pairs, None])
    return output.to(x.dtype)


def _product(x: torch.Tensor, weight: Matrix, expert: int, wide: bool = False) -> torch.Tensor:
    """x times one expert's weight [N, K]."""
    if isinstance(weight, Quantized):
        return grouped_linear_cpu(x, weight[expert], wide=wide)
    if not isinstance(weight, Panels):
        return linear_cpu(x, weight[expert], wide=wide)
    own = unpacked(weight._replace(values=weight.values[expert]))
    return linear_cpu(x, own.reshape(-1, weight.shape[-1]), wide=wide)
