"""A mixture of experts in bf16 and in codes, packed as at a start: ranks' shares, and what padding
takes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from minisgl import csrc
from minisgl.device.tape import Arena, TapeGraph, calls_noted
from minisgl.kernels.activation import silu_and_mul_reference
from minisgl.kernels.grouped_linear import rounded_to_int8
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.grouped_linear.weights import Grouped, quantized
from minisgl.kernels.linear.panels import Panels
from minisgl.kernels.moe import (
    moe_experts,
    moe_experts_reference,
    moe_route_reference,
    packed_experts,
)
from minisgl.layers.mlp import Moe, MoeConfig
from minisgl.layers.weights import Placement
from minisgl.parallel import Communicator
from tests.world.levels import at, levels

HIDDEN, INNER, EXPERTS, TOP_K = 96, 48, 6, 3


def _layer(full: dict[str, torch.Tensor], rank: int, size: int) -> Moe:
    at = Placement(torch.bfloat16, torch.device("cpu"), Communicator(rank, size))
    moe = Moe("mlp", HIDDEN, MoeConfig(EXPERTS, TOP_K, INNER, True), "silu", at)
    for weight in moe.weights():
        weight.target.copy_(full[weight.name][weight.slices])
    moe.pack()
    return moe


def test_packed_shares_add_up_to_the_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {w.name: w.shape for w in Moe(
        "mlp", HIDDEN, MoeConfig(EXPERTS, TOP_K, INNER, True), "silu",
        Placement(torch.bfloat16, torch.device("cpu"), Communicator()),
    ).weights()}  # fmt: skip
    full = {
        name: (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()
        for name, shape in shapes.items()
    }
    x = torch.randn(37, HIDDEN, generator=generator).bfloat16()

    def stacked(name: str) -> torch.Tensor:
        names = (f"mlp.experts.{e}.{name}_proj.weight" for e in range(EXPERTS))
        return torch.stack([full[each].double() for each in names])

    gate_up = torch.cat([stacked("gate"), stacked("up")], dim=1)
    router = (x @ full["mlp.gate.weight"].T).float()
    chosen = moe_route_reference(router, TOP_K, True)
    want = moe_experts_reference(x.double(), gate_up, stacked("down"), *chosen)
    for size in (1, 2):
        layers = [_layer(full, rank, size) for rank in range(size)]
        got = sum(layer(x).double() for layer in layers)
        assert (got - want).norm() < 0.01 * want.norm()
        for layer in layers:
            packed = [v for v in vars(layer).values() if isinstance(v, Panels)]
            held = sum(panels.values.nbytes for panels in packed)
            weights = 2 * (EXPERTS * HIDDEN + EXPERTS * 3 * HIDDEN * INNER // size)
            total = sum(tensor.nbytes for tensor in layer.tensors())
            assert total == (held if packed else weights)


NEEDS_NATIVE = pytest.mark.skipif(
    csrc.load("model_ops", wait=True) is None, reason="nothing is packed"
)


def _coded(bits: int, inner: int, hidden: int, dtype: torch.dtype, activations: Any) -> Any:
    """gate_up and down in codes; where groups of 32 do not divide `inner`, down in floats."""
    generator = torch.Generator().manual_seed(bits)

    def matrix(rows: int, inputs: int) -> torch.Tensor | Grouped:
        weight = torch.randn(EXPERTS, rows, inputs, generator=generator) * inputs**-0.5
        if inputs % 32:
            return weight.to(dtype)
        return replace(quantized(weight, bits, 32), dtype=dtype, activations=activations)

    return matrix(2 * inner, hidden), matrix(hidden, inner)


def _routed(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x, logits = (torch.randn(tokens, n, generator=generator) for n in (hidden, EXPERTS))
    weights, ids = moe_route_reference(logits, TOP_K, True)
    return x.to(dtype), weights, torch.where(ids == 2, -1, ids)


@NEEDS_NATIVE
@pytest.mark.parametrize("level", [*levels(), None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("inner", [64, 48, 224])
def test_experts_in_codes(
    bits: int, activations: Any, inner: int, dtype: torch.dtype, level: str | None
) -> None:
    """Of 48 inputs no groups of 32 are made, so the second product stays in floats."""
    gate_up, down = _coded(bits, inner, HIDDEN, dtype, activations)
    x, weights, ids = _routed(37, HIDDEN, dtype)
    exact = [w.float() if torch.is_tensor(w) else w.dequantized() for w in (gate_up, down)]
    want = torch.zeros(37, HIDDEN)
    for (token, choice), expert in zip(
        torch.cartesian_prod(torch.arange(37), torch.arange(TOP_K)), ids.flatten(), strict=True
    ):
        if expert < 0:
            continue
        own = x[token, None].float()
        if activations == "int8":
            own = rounded_to_int8(own)
        middle = silu_and_mul_reference(own @ exact[0][expert].T).to(dtype).float()
        if activations == "int8" and inner != 48:
            middle = rounded_to_int8(middle)
        want[token] += weights[token, choice] * (middle @ exact[1][expert].T)[0]
    codes = gate_up.codes.clone()
    coded = packed_experts(gate_up, down)
    assert isinstance(coded[0], GroupedPanels)
    assert torch.is_tensor(down) != isinstance(coded[1], GroupedPanels)
    assert torch.equal(coded[0].unpacked().codes.reshape(codes.shape), codes)
    with at(level):
        for found in (
            moe_experts(x, *coded, weights, ids),
            moe_experts_reference(x, *coded, weights, ids),
        ):
            error = (found - want).norm() / want.norm()
            assert error < (0.01 if dtype == torch.bfloat16 or activations == "int8" else 1e-5)
        if level is not None and not any(map(torch.is_tensor, coded)):  # bf16 alone has panels
            one = moe_experts(x[5:6], *coded, weights[5:6], ids[5:6])
            assert torch.equal(one, moe_experts(x, *coded, weights, ids)[5:6])


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_tape_of_experts_in_codes_needs_no_python(
    bits: int, activations: Any, dtype: torch.dtype
) -> None:
    """With other values in the same buffers it gives the bits of an eager call."""
    coded = packed_experts(*_coded(bits, 96, HIDDEN, dtype, activations))
    x, weights, ids = _routed(19, HIDDEN, dtype)
    out = torch.empty_like(x)
    with calls_noted() as calls:
        moe_experts(x, *coded, weights, ids)
    assert not calls
    graph = TapeGraph(lambda: out.copy_(moe_experts(x, *coded, weights, ids)), Arena())
    graph.replay()
    for buffer, other in zip((x, weights, ids), _routed(19, HIDDEN, dtype), strict=True):
        buffer.copy_(other.flip(0))
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, moe_experts(x, *coded, weights, ids))
