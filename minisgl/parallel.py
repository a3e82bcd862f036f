"""What the ranks of one model say to each other. One process alone is a `Solo`.

Layers take a `Communicator` and hold the shard that their rank computes; which dimension of which
weight is split is said where the weight is declared, so a block's code reads the same for one rank
and for many.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Communicator(Protocol):
    """Collectives over `size` ranks. Every rank calls the same ones in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`; may reuse `x`."""

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's `x`, joined along `dim` in rank order."""

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """`x` of rank `source`; may reuse `x`."""


@dataclass(frozen=True)
class Solo:
    """The communicator of one rank: nothing to say, nobody to say it to."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return x

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        return x


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
