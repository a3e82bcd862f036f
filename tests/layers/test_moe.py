"""A mixture of experts in bf16, packed as at a start: ranks' shares, and what padding takes."""

import torch

from minisgl.kernels.linear.panels import Panels
from minisgl.kernels.moe import moe_experts_reference, moe_route_reference
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
