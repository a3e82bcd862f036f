"""Collectives between the ranks of one model. A process alone has a plain `Communicator`.

Layers take a `Communicator` and hold the shard that their rank computes; which dimension of which
weight is split is declared with the weight, so a block's code is the same for any number of ranks.
"""

from dataclasses import dataclass

import torch

from minisgl.kernels.rmsnorm import rmsnorm


@dataclass(eq=False)
class Communicator:
    """Collectives over `size` ranks, inside the device's stream; this one knows no other rank.

    Every rank calls the same ones in the same order. They raise RuntimeError when a rank is gone.
    With `ordered`, sums are taken in rank order at every size: an element's sum is then a function
    of its addends alone, as batch invariance needs, and not of the shape they travel in.
    """

    rank: int = 0
    size: int = 1
    ordered: bool = True

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, the same to the bit on all of them; may reuse `x`."""
        return x

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
        return rmsnorm(self.all_reduce(x), weight, eps, residual, unit_offset)  # type: ignore[no-any-return]

    def gather(self, x: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """On rank 0 every rank's `x` joined along the last dimension in rank order, of which the
        first `width` entries are kept; elsewhere `x` itself."""
        return x[..., :width]

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`; may be written into `x`."""
        return x

    def check(self) -> None:
        """RuntimeError if a collective that has ended went wrong without raising (on a GPU)."""

    def abort(self) -> None:
        """From any thread: end what waits for a rank that is gone. Nothing works afterwards."""

    def close(self) -> None:
        """Idempotent."""


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
