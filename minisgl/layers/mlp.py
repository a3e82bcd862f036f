"""Feed-forward blocks: dense, and mixture of experts.

They return this rank's part of their output, all ranks' parts adding up to it.
"""

from collections.abc import Iterator

import torch

from minisgl.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from minisgl.kernels.linear import linear
from minisgl.kernels.moe import moe_experts, moe_route
from minisgl.layers.linear import ColumnLinear, Part, RowLinear
from minisgl.layers.weights import Placement, Weight
from minisgl.parallel import share

ACTIVATIONS = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


class Mlp:
    """down(act(gate x) * up x)."""

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        inner_size: int,
        activation: str,
        *,
        bias: bool,
        at: Placement,
    ) -> None:
        parts = [Part("gate_proj", inner_size), Part("up_proj", inner_size)]
        self.gate_up = ColumnLinear(prefix, hidden_size, parts, bias=bias, at=at)
        self.down = RowLinear(f"{prefix}.down_proj", inner_size, 1, hidden_size, bias=bias, at=at)
        self.activation = ACTIVATIONS[activation]

    def pack(self) -> None:
        self.gate_up.pack()
        self.down.pack()

    def weights(self) -> Iterator[Weight]:
        yield from self.gate_up.weights()
        yield from self.down.weights()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate_up(x)))


class Moe:
    """The top_k experts of each token, weighted by the router; ranks share each expert's rows."""

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        inner_size: int,
        num_experts: int,
        top_k: int,
        renormalize: bool,
        activation: str,
        *,
        at: Placement,
    ) -> None:
        self.prefix = prefix
        self.top_k = top_k
        self.renormalize = renormalize
        self.activation = activation
        self.inner_size = inner_size
        self.start, inner = share(f"{prefix} inner size", inner_size, at.comm)
        self.router = at.empty(num_experts, hidden_size)
        self.gate_up = at.empty(num_experts, 2 * inner, hidden_size)
        self.down = at.empty(num_experts, hidden_size, inner)

    def pack(self) -> None:
        pass  # experts are read as they are

    def weights(self) -> Iterator[Weight]:
        num_experts, hidden, inner = self.down.shape
        yield Weight(f"{self.prefix}.gate.weight", self.router, (num_experts, hidden))
        by_rows, by_columns = (self.inner_size, hidden), (hidden, self.inner_size)
        for e in range(num_experts):
            name = f"{self.prefix}.experts.{e}"
            gate, up, down = self.gate_up[e, :inner], self.gate_up[e, inner:], self.down[e]
            yield Weight(f"{name}.gate_proj.weight", gate, by_rows, 0, self.start)
            yield Weight(f"{name}.up_proj.weight", up, by_rows, 0, self.start)
            yield Weight(f"{name}.down_proj.weight", down, by_columns, 1, self.start)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = moe_route(linear(x, self.router), self.top_k, self.renormalize)
        return moe_experts(x, self.gate_up, self.down, weights, ids, self.activation)  # type: ignore[no-any-return]
