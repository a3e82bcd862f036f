"""Mixture of experts: which experts a token goes to, and their gated feed-forward blocks.

    p = softmax(logits); the K largest p, divided by their sum when `renormalize`
    y = sum_k p_k * down_k (act(gate_k x) * up_k x)

Sources: Shazeer et al., "Outrageously Large Neural Networks", 2017; grouped expert products as in
Gale et al., "MegaBlocks", 2022.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from minisgl.kernels.activation import gelu_tanh_and_mul_reference, silu_and_mul_reference
from minisgl.kernels.grouped_linear import grouped_linear_reference
from minisgl.kernels.grouped_linear.weights import Grouped, quantized
from minisgl.kernels.linear.panels import Panels
from minisgl.kernels.matrix import Matrix, Quantized, packed, tensors, unpacked
from minisgl.kernels.op import Case, Cost, Expected, Implementation, Op

ACTIVATIONS = {"silu": silu_and_mul_reference, "gelu_tanh": gelu_tanh_and_mul_reference}


def moe_route_reference(
    logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [T, E]. Returns weights [T, K] fp32 and expert ids [T, K] int32, largest first.

    The softmax is taken in fp32; of equal experts the lower id comes first.
    """
    probabilities = torch.softmax(logits.float(), dim=-1)
    weights, ids = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, ids = weights[:, :top_k], ids[:, :top_k]
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.contiguous(), ids.int()


def moe_experts_reference(
    x: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """x: [T, H]; gate_up: [E, 2N, H], the gate first; down: [E, H, N]. Returns [T, H].

    In a CPU's panels gate_up is [E, 2, N, H].
    weights: [T, K] fp32 and ids: [T, K] int32 as `moe_route` gives them; an id outside [0, E)
    belongs to another rank and adds nothing. activation: "silu" or "gelu_tanh". Each expert's
    products are in x's dtype, their weighted sum over k is taken in fp32 and rounded once. Only
    experts that were chosen are computed, each once over all its tokens.
    """
    num_experts, top_k = gate_up.shape[0], ids.shape[1]
    gate_up, down = (unpacked(w) if isinstance(w, Panels) else w for w in (gate_up, down))
    flat = ids.flatten().long()
    order = torch.argsort(flat, stable=True)
    chosen, counts = torch.unique_consecutive(flat[order], return_counts=True)
    output = torch.zeros_like(x).float()
    start = 0
    for expert, count in zip(chosen.tolist(), counts.tolist(), strict=True):
        pairs = order[start : start + count]
        start += count
        if not 0 <= expert < num_experts:
            continue
        tokens = pairs // top_k
        hidden = ACTIVATIONS[activation](_product(x[tokens], gate_up, expert))
        contribution = _product(hidden, down, expert).float()
        output.index_add_(0, tokens, contribution * weights.flatten()[pairs, None])
    return output.to(x.dtype)


def _product(x: torch.Tensor, weight: Matrix, expert: int) -> torch.Tensor:
    """x times one expert's weight; gates and ups that are apart one after the other."""
    own: Any = weight[expert]
    if isinstance(own, Quantized):
        grouped = own if isinstance(own, Grouped) else own.unpacked()
        return grouped_linear_reference(x, grouped.reshaped(-1))
    return x @ own.flatten(0, -2).T  # type: ignore[no-any-return]


def packed_experts(
    gate_up: torch.Tensor | Grouped, down: torch.Tensor | Grouped
) -> tuple[Matrix, Matrix]:
    """gate_up [E, 2N, H] and down [E, H, N] as products on their device read them fastest: gates
    [E, 2, N, H] apart from ups in a CPU's panels. Or as they are, where `packed` leaves them so."""
    if gate_up.device.type != "cpu":
        return packed(gate_up), packed(down)
    experts, _, hidden = gate_up.shape
    if isinstance(gate_up, Grouped):
        gates = packed(gate_up.reshaped(experts, 2, -1))
    else:
        gates = packed(gate_up.view(experts, 2, -1, hidden))
    return (gate_up if type(gates) is type(gate_up) else gates), packed(down)


def moe_route_cost(logits: torch.Tensor, top_k: int, **_: Any) -> Cost:
    tokens = logits.shape[0]
    moved = logits.numel() * logits.element_size() + 8 * tokens * top_k
    return Cost(bytes=moved, flops=4 * logits.numel())


def moe_experts_cost(
    x: torch.Tensor, gate_up: Matrix, down: Matrix, ids: torch.Tensor, **_: Any
) -> Cost:
    used = ids.unique().numel() / gate_up.shape[0]
    per_expert = math.prod(gate_up.shape[1:]) + math.prod(down.shape[1:])
    held = sum(each.nbytes for weight in (gate_up, down) for each in tensors(weight))
    moved = used * held + 2 * x.nbytes + 8 * ids.numel()
    return Cost(bytes=int(moved), flops=2 * ids.numel() * per_expert)


def _route_case(tokens: int, experts: int, top_k: int, renormalize: bool) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        logits = torch.randn(tokens, experts, generator=generator, device=generator.device)
        return {
            "logits": logits.to(device, dtype),
            "top_k": top_k,
            "renormalize": renormalize,
        }

    label = f"T{tokens}-E{experts}-K{top_k}" + ("-renormalize" if renormalize else "")
    return Case(label, make)


def _experts_case(
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    *,
    activation: str = "silu",
    foreign: bool = False,
    bits: int | None = None,
) -> Case:
    """bits: of codes; where groups of 32 do not divide `inner`, the second product is in floats."""

    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=on)

        def matrix(rows: int, inputs: int) -> torch.Tensor | Grouped:
            weight = normal(experts, rows, inputs) * inputs**-0.5
            if bits is None or inputs % 32:
                return weight.to(device, dtype)
            return replace(quantized(weight.to(device), bits, 32), dtype=dtype)

        logits = normal(tokens, experts) * 2
        weights, ids = moe_route_reference(logits, top_k, True)
        if foreign:
            ids = torch.where(ids % 2 == 0, ids, -1)
        return {
            "x": normal(tokens, hidden).to(device, dtype),
            "gate_up": matrix(2 * inner, hidden),
            "down": matrix(hidden, inner),
            "weights": weights.to(device),
            "ids": ids.to(device),
            "activation": activation,
        }

    label = f"T{tokens}-E{experts}-K{top_k}-H{hidden}-N{inner}-{activation}"
    label += f"-{bits}bits" if bits else ""
    return Case(label + ("-foreign" if foreign else ""), make)


ROUTE_CASES = (
    _route_case(1, 128, 8, True),
    _route_case(33, 60, 4, False),
    _route_case(7, 8, 2, True),
    _route_case(0, 16, 4, True),
)
EXPERTS_CASES = (
    _experts_case(1, 8, 2, 64, 32),
    _experts_case(33, 8, 2, 96, 80),
    _experts_case(70, 5, 3, 128, 48, activation="gelu_tanh"),
    _experts_case(9, 8, 4, 64, 32, foreign=True),
    _experts_case(1, 8, 2, 96, 32, bits=4),
    _experts_case(70, 5, 3, 128, 96, activation="gelu_tanh", bits=8),
    _experts_case(95, 3, 2, 160, 224, foreign=True, bits=4),
    _experts_case(33, 8, 2, 96, 80, bits=4),
)

moe_route = Op(
    "moe_route",
    moe_route_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.moe.portable:moe_route_portable"),
        Implementation("cpu", "cpu", "minisgl.kernels.moe.cpu:moe_route_cpu"),
    ],
    cases=ROUTE_CASES,
    cost=moe_route_cost,
)
moe_experts = Op(
    "moe_experts",
    moe_experts_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.moe.portable:moe_experts_portable"),
        Implementation("cpu", "cpu", "minisgl.kernels.moe.cpu:moe_experts_cpu"),
    ],
    cases=EXPERTS_CASES,
    cost=moe_experts_cost,
    expected=[
        Expected("experts_kernel", ("load128", "wgmma")),
        Expected("coded_experts_kernel", ("wgmma",), lambda facts: facts["arch"] >= 90),
        Expected("coded_experts_kernel", ("mma",), lambda facts: facts["arch"] < 90),
    ],
)
