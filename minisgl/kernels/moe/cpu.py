"""Mixtures of experts on CPU: csrc/cpu/moe.cpp, for experts in panels; and the reference's grouping
with the CPU's own linear layers and activations."""

import torch

from minisgl.device.tape import by_call, empty
from minisgl.kernels.activation.cpu import gelu_tanh_and_mul_cpu, silu_and_mul_cpu
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.grouped_linear.weights import BLOCK
from minisgl.kernels.linear.cpu import linear_cpu
from minisgl.kernels.linear.panels import Dense, Panels, unpacked
from minisgl.kernels.matrix import Matrix, Quantized
from minisgl.kernels.moe import moe_experts_reference, moe_route_reference
from minisgl.kernels.native import address, model_ops

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
    kinds = Panels | GroupedPanels
    if not (isinstance(gate_up, kinds) and isinstance(down, kinds)):
        return moe_experts_twin(x, gate_up, down, weights, ids, activation)
    native = model_ops(x, *(w.values for w in (gate_up, down) if isinstance(w, Panels)))
    (tokens, top_k), (experts, hidden, inner) = ids.shape, down.shape
    shapes = (*x.shape, *weights.shape, *gate_up.shape)
    fits = shapes == (tokens, hidden, tokens, top_k, experts, 2, inner, hidden)
    fits = fits and all(tensor.is_contiguous() for tensor in (x, weights, ids))
    if native is None or not fits:
        return moe_experts_twin(x, gate_up, down, weights, ids, activation)
    pairs = tokens * top_k
    middle, parts = (empty((pairs, width), x.dtype) for width in (inner, hidden))
    out = empty((tokens, hidden), x.dtype)
    rounded: tuple[torch.Tensor | None, ...] = (None, None, None)
    if any(isinstance(w, GroupedPanels) and w.activations == "int8" for w in (gate_up, down)):
        most = pairs * max(hidden, inner)
        numbers = (empty((most // BLOCK + pairs,), torch.float32) for _ in range(2))
        rounded = empty((most,), torch.int8), *numbers
    native.moe_experts(
        x.data_ptr(),
        x.stride(0),
        _addresses(gate_up),
        _addresses(down),
        weights.data_ptr(),
        ids.data_ptr(),
        tuple(map(address, rounded)),
        *(tensor.data_ptr() for tensor in (middle, parts, out)),
        *(tokens, experts, top_k, hidden, inner),
        activation == "gelu_tanh",
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def _addresses(weight: Panels | GroupedPanels) -> tuple[int | bool, ...]:
    """As the native op takes it."""
    if isinstance(weight, Panels):
        return weight.values.data_ptr(), 0, 0, 0, 16, False, False
    _, _, *layout = weight.layout
    return *weight.addresses, *layout, weight.activations == "int8"


@by_call
def moe_experts_twin(
    x: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """The same for weights as they are; in codes the reference. A token's experts are added in
    ascending order of ids."""
    if isinstance(gate_up, Quantized) or isinstance(down, Quantized):
        return moe_experts_reference(x, gate_up, down, weights, ids, activation)
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


def _product(x: torch.Tensor, weight: Dense, expert: int, wide: bool = False) -> torch.Tensor:
    """x times one expert's weight [N, K]."""
    if not isinstance(weight, Panels):
        return linear_cpu(x, weight[expert], wide=wide)
    own = unpacked(weight._replace(values=weight.values[expert]))
    return linear_cpu(x, own.reshape(-1, weight.shape[-1]), wide=wide)
