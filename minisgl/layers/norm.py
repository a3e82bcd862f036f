"""RMS normalisation with a learned scale."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from minisgl.kernels.rmsnorm import rmsnorm
from minisgl.layers.weights import Block, Weight
from minisgl.parallel import Communicator


@dataclass(eq=False)
class RMSNorm(Block):
    """`minisgl.kernels.rmsnorm` over the last dimension, with its weight."""

    name: str
    weight: torch.Tensor
    eps: float
    unit_offset: bool
    comm: Communicator | None = None  # then `add` takes this rank's part of x, and sums all ranks'

    def weights(self) -> Iterator[Weight]:
        yield Weight(f"{self.name}.weight", self.weight, tuple(self.weight.shape))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rmsnorm(x, self.weight, self.eps, None, self.unit_offset)  # type: ignore[no-any-return]

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (normalised sum, sum); may reuse `x`."""
        if self.comm is not None:
            return self.comm.all_reduce_norm(x, residual, self.weight, self.eps, self.unit_offset)
        return rmsnorm(x, self.weight, self.eps, residual, self.unit_offset)  # type: ignore[no-any-return]
