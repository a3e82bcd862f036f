"""RMS normalisation with a learned scale."""

from collections.abc import Iterator

import torch

from minisgl.kernels.rmsnorm import rmsnorm
from minisgl.layers.weights import Placement, Weight


class RMSNorm:
    """`minisgl.kernels.rmsnorm` over the last dimension, with its weight."""

    def __init__(
        self,
        name: str,
        size: int,
        eps: float,
        unit_offset: bool,
        at: Placement,
        *,
        of_parts: bool = False,
    ) -> None:
        """With `of_parts`, `add` takes this rank's part of what it adds, and sums all ranks'."""
        self.name = name
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = at.empty(size)
        self.of_parts = of_parts
        self.comm = at.comm

    def weights(self) -> Iterator[Weight]:
        yield Weight(f"{self.name}.weight", self.weight, tuple(self.weight.shape))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rmsnorm(x, self.weight, self.eps, None, self.unit_offset)  # type: ignore[no-any-return]

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (normalised sum, sum); may reuse `x`."""
        if self.of_parts:
            return self.comm.all_reduce_norm(x, residual, self.weight, self.eps, self.unit_offset)
        return rmsnorm(x, self.weight, self.eps, residual, self.unit_offset)  # type: ignore[no-any-return]
