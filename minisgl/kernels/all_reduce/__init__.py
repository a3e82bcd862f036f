"""All-reduce between the GPUs of one machine, alone or with what follows it in a decoder.

    y = x_0 + x_1 + ... + x_(R-1)          fp32 in rank order, rounded once to the dtype
    s = y + residual                        rounded: the new residual
    z = rmsnorm(s) * w                      as in `kernels/rmsnorm`

The kernels are in csrc/cuda/all_reduce.cu, their protocol, and why it is right, in
all_reduce_protocol.h beside it. A *path* is how the data travels: every rank reads all others
(one-shot: fewest barriers), each rank sums its share for all (two-shot: fewest bytes), or the
switch sums (multimem: NVLink SHARP, in its own order of additions). One-shot and two-shot sums are
equal to the bit, so the size may choose between them in every mode.

The sizes from which on each path is used follow published measurements (docs/ALL_REDUCE.md); on a
machine with several GPUs `python -m benchmarks.all_reduce` measures them.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch

KB, MB = 1 << 10, 1 << 20
CAPACITY = 8 * MB  # bytes of one call; each rank holds two halves of it


class SumPath(IntEnum):
    """As in all_reduce_protocol.h."""

    ONE_SHOT = 0
    TWO_SHOT = 1
    MULTIMEM = 2


@dataclass(frozen=True)
class LargestCalls:
    """The largest calls, in bytes, that each path should take; above all of them NCCL is faster."""

    one_shot: int
    two_shot: int
    multimem: int  # where the devices have it; it takes what is too large for one-shot


LARGEST_CALLS = {  # by number of ranks, at most
    2: LargestCalls(one_shot=8 * MB, two_shot=0, multimem=0),
    4: LargestCalls(one_shot=512 * KB, two_shot=8 * MB, multimem=8 * MB),
    8: LargestCalls(one_shot=256 * KB, two_shot=8 * MB, multimem=8 * MB),
}


def choose(num_bytes: int, ranks: int, *, multimem: bool, ordered: bool) -> SumPath | None:
    """The path of a call of `num_bytes`; None: NCCL.

    With `ordered` the sum is taken in rank order at every size, so never by NCCL or the switch;
    what exceeds the capacity is cut in pieces.
    """
    limits = LARGEST_CALLS[min(most for most in LARGEST_CALLS if ranks <= most)]
    if num_bytes <= limits.one_shot:
        return SumPath.ONE_SHOT
    if ordered:
        return SumPath.TWO_SHOT
    if multimem and num_bytes <= limits.multimem:
        return SumPath.MULTIMEM
    return SumPath.TWO_SHOT if num_bytes <= limits.two_shot else None


def all_reduce_reference(parts: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of parts [R, ...], in rank order. Returns [...] in parts' dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


def all_reduce_norm_reference(
    parts: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    unit_offset: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """parts: [R, T, H]; residual: [T, H]; weight: [H]. Returns (normalised sum, sum), [T, H]."""
    total = all_reduce_reference(parts) + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    scaled = wide * (weight.float() + 1.0 if unit_offset else weight.float())
    return scaled.to(parts.dtype), total


def received_bytes(num_bytes: int, ranks: int, path: SumPath) -> int:
    """What one rank receives over its links in a call of `num_bytes`."""
    share = -(-num_bytes // ranks)
    if path is SumPath.ONE_SHOT:
        return (ranks - 1) * num_bytes
    if path is SumPath.TWO_SHOT:
        return 2 * (ranks - 1) * share
    return share + num_bytes  # its share as the switch has added it, then all shares
