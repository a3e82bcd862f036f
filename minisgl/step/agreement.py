"""Checks that all ranks compute the same, by hashes of each step (`--log-level debug`)."""

import zlib

import torch

from minisgl.parallel import Communicator
from minisgl.step.inputs import PackedBatch, join

PARTS = ("the number", "the plan", "the sum of the hidden states")


def compare_ranks(comm: Communicator, packed: PackedBatch, hidden: torch.Tensor) -> None:
    """Raises RuntimeError on rank 0 when a rank runs another step or gets other values.

    hidden: [T, H], the same on all ranks to the bit. Rank 0 waits for the device.
    """
    plan = zlib.crc32(join(packed.sections).tobytes())
    whole = torch.int16 if hidden.element_size() == 2 else torch.int32
    bits = hidden.contiguous().view(whole).sum(dtype=torch.int64)
    known = torch.tensor([packed.batch.step, plan], dtype=torch.int64, device=hidden.device)
    everyone = comm.gather(torch.cat([known, bits[None]]))
    if comm.rank != 0:
        return
    own, *others = everyone.view(comm.size, -1).tolist()
    for rank, other in enumerate(others, start=1):
        for part, here, there in zip(PARTS, own, other, strict=True):
            if here != there:
                raise RuntimeError(
                    f"step {own[0]}: {part} is {there} on rank {rank} and {here} on rank 0"
                )
