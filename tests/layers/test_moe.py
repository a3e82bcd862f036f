"""A mixture of experts in bf16 and in codes, packed as at a start: ranks' shares, and what padding
takes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from minisgl import csrc
from minisgl.kernels.activation import silu_and_mul_reference
from minisgl.kernels.grouped_linear import rounded_to_int8
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.grouped_linear.weights import quantized
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


@pytest.mark.skipif(csrc.load("model_ops", wait=True) is None, reason="nothing is packed")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("mixed", [False, True])
def test_experts_in_codes(bits: int, activations: Any, mixed: bool) -> None:
    """`mixed`: of 48 inputs no groups of 32 are made, so the second product stays in floats."""
    generator = torch.Generator().manual_seed(bits)
    inner = 48 if mixed else 64

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    gate_up = quantized(normal(EXPERTS, 2 * inner, HIDDEN) * HIDDEN**-0.5, bits, 32)
    down: Any = (normal(EXPERTS, HIDDEN, inner) * inner**-0.5).bfloat16()
    how: Any = {"dtype": torch.bfloat16, "activations": activations}
    gate_up, down = (
        replace(gate_up, **how),
        down if mixed else replace(quantized(down, bits, 32), **how),
    )
    x = normal(37, HIDDEN).bfloat16()
    weights, ids = moe_route_reference(normal(37, EXPERTS), TOP_K, True)
    ids = torch.where(ids == 2, -1, ids)
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
        middle = silu_and_mul_reference((own @ exact[0][expert].T).bfloat16()).float()
        if activations == "int8" and not mixed:
            middle = rounded_to_int8(middle)
        want[token] += weights[token, choice] * (middle @ exact[1][expert].T)[0]
    codes = gate_up.codes.clone()
    coded = packed_experts(gate_up, down)
    assert isinstance(coded[0], GroupedPanels)
    assert isinstance(coded[1], torch.Tensor if mixed else GroupedPanels)
    assert torch.equal(coded[0].unpacked().codes, codes)
    for found in (
        moe_experts(x, *coded, weights, ids),
        moe_experts_reference(x, *coded, weights, ids),
    ):
        assert (found - want).norm() < 0.01 * want.norm()
    one = moe_experts(x[5:6], *coded, weights[5:6], ids[5:6])
    assert torch.equal(one, moe_experts(x, *coded, weights, ids)[5:6])
