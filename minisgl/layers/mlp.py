"""Feed-forward blocks: dense, and mixture of experts.

They return this rank's part of their output, all ranks' parts adding up to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from minisgl.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from minisgl.kernels.grouped_linear.weights import Grouped
from minisgl.kernels.matrix import Matrix, packed, product
from minisgl.kernels.moe import moe_experts, moe_route, packed_experts
from minisgl.kernels.op import Op
from minisgl.layers.linear import ColumnLinear, RowLinear
from minisgl.layers.weights import Block, Placement, Weight
from minisgl.parallel import share

ACTIVATIONS = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


@dataclass(eq=False)
class Mlp(Block):
    """down(act(gate x) * up x)."""

    gate_up: ColumnLinear
    down: RowLinear
    activation: Op

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate_up(x)))


@dataclass(frozen=True)
class MoeConfig:
    """A mixture-of-experts feed-forward block."""

    num_experts: int
    top_k: int
    inner_size: int
    renormalize: bool  # the weights of the chosen experts sum to 1


class Moe(Block):
    """The top_k experts of each token, weighted by the router; ranks share each expert's rows."""

    matrices = "gate_up", "down"

    def __init__(
        self, prefix: str, hidden_size: int, config: MoeConfig, activation: str, at: Placement
    ) -> None:
        self.prefix = prefix
        self.config = config
        self.activation = activation
        self.start, inner = share(f"{prefix} inner size", config.inner_size, at.comm)
        self.router: Matrix = at.empty(config.num_experts, hidden_size)
        experts = [f"{prefix}.experts.{e}" for e in range(config.num_experts)]
        names = [f"{expert}.{part}_proj" for expert in experts for part in ("gate", "up")]
        self.gate_up: Matrix = at.matrix(names, config.num_experts, 2 * inner, hidden_size)
        names = [f"{expert}.down_proj" for expert in experts]
        self.down: Matrix = at.matrix(names, config.num_experts, hidden_size, inner)

    def weights(self) -> Iterator[Weight]:
        num_experts, hidden, inner = self.down.shape
        yield Weight(f"{self.prefix}.gate.weight", self.router, (num_experts, hidden))
        by_rows = (self.config.inner_size, hidden)
        for e in range(num_experts):
            name = f"{self.prefix}.experts.{e}"
            gate, up, down = self.gate_up[e][:inner], self.gate_up[e][inner:], self.down[e]
            yield Weight(f"{name}.gate_proj.weight", gate, by_rows, 0, self.start)
            yield Weight(f"{name}.up_proj.weight", up, by_rows, 0, self.start)
            yield Weight(f"{name}.down_proj.weight", down, by_rows[::-1], 1, self.start)

    def pack(self) -> None:
        self.router = packed(self.router)
        gate_up, down, kinds = self.gate_up, self.down, (torch.Tensor, Grouped)
        if isinstance(gate_up, kinds) and isinstance(down, kinds):
            self.gate_up, self.down = packed_experts(gate_up, down)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.config.top_k, self.config.renormalize
        weights, ids = moe_route(product(x, self.router), *chosen)
        return moe_experts(x, self.gate_up, self.down, weights, ids, self.activation)  # type: ignore[no-any-return]
