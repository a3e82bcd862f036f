"""Collectives between the ranks of one model. A process alone has a `Solo`.

Layers take a `Communicator` and hold the shard that their rank computes; which dimension of which
weight is split is declared with the weight, so a block's code is the same for any number of ranks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from minisgl.kernels.rmsnorm import rmsnorm


class Communicator(Protocol):
    """Collectives over `size` ranks, inside the device's stream.

    Every rank calls the same ones in the same order. They raise RuntimeError when a rank is gone.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def ordered(self) -> bool:
        """Whether sums are taken in rank order at every size.

        An element's sum is then a function of its addends alone, as batch invariance needs, and
        not of the shape they travel in.
        """

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, the same to the bit on all of them; may reuse `x`."""

    def all_reduce_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        unit_offset: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`rmsnorm` of the sum of every rank's `x` and the residual, which is alike on all.

        x, residual: [T, H]; weight: [H]. Returns (normalised sum, sum); may reuse `x`.
        """

    def gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """On rank 0 every rank's `x`, joined along `dim` in rank order; elsewhere `x` itself."""

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`; may be written into `x`."""

    def check(self) -> None:
        """RuntimeError if a collective that has ended went wrong without raising (on a GPU)."""

    def abort(self) -> None:
        """From any thread: end what waits for a rank that is gone. Nothing works afterwards."""

    def close(self) -> None:
        """Idempotent."""


class SumThenNorm:
    """`all_reduce_norm` of a communicator that has no kernel for both at once."""

    def all_reduce_norm(
        self: Communicator,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        unit_offset: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rmsnorm(self.all_reduce(x), weight, eps, residual, unit_offset)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Solo(SumThenNorm):
    """The communicator of one rank: every collective returns what it is given."""

    rank: int = 0
    size: int = 1
    ordered: bool = True

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def check(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def share(what: str, units: int, comm: Communicator, *, repeated: bool = False) -> tuple[int, int]:
    """(first, count) of the `units` that this rank holds.

    With `repeated`, fewer units than ranks are held by several (key heads under many ranks).
    ValueError where the ranks cannot have equal parts.
    """
    if units % comm.size == 0:
        count = units // comm.size
        return comm.rank * count, count
    if repeated and comm.size % units == 0:
        return comm.rank * units // comm.size, 1
    raise ValueError(f"{what} ({units}) cannot be shared equally by {comm.size} ranks")
