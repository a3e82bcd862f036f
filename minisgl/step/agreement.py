"""What ranks settle between them besides the model's sums: memory, and hashes to find faults."""

import zlib
from dataclasses import replace

import torch

from minisgl.device import Device, Memory
from minisgl.parallel import Communicator
from minisgl.step.inputs import StepArrays, join

PARTS = ("the number", "the plan", "the sum of the hidden states")


def compare_ranks(comm: Communicator, arrays: StepArrays, hidden: torch.Tensor) -> None:
    """Raises RuntimeError on rank 0 when a rank runs another step, or computes something else.

    hidden: [T, H], the same on all ranks to the bit. Rank 0 waits for the device.
    """
    plan = zlib.crc32(join(arrays.sections).tobytes())
    whole = torch.int16 if hidden.element_size() == 2 else torch.int32
    bits = hidden.contiguous().view(whole).sum(dtype=torch.int64)
    known = torch.tensor([arrays.batch.step, plan], dtype=torch.int64, device=hidden.device)
    everyone = comm.gather(torch.cat([known, bits[None]])[None], 0)
    if comm.rank != 0:
        return
    own, *others = everyone.tolist()
    for rank, other in enumerate(others, start=1):
        for part, here, there in zip(PARTS, own, other, strict=True):
            if here != there:
                raise RuntimeError(
                    f"step {own[0]}: {part} is {there} on rank {rank} and {here} on rank 0"
                )


def share_of_memory(comm: Communicator, device: Device, local_size: int) -> Memory:
    """The device's memory once every rank has loaded; of a CPU's, what is free for one of them."""
    comm.all_reduce(torch.zeros(1, device=device.torch_device))
    memory = device.memory()
    on_cpu = device.torch_device.type == "cpu"
    return replace(memory, free=memory.free // local_size) if on_cpu else memory


def fewest(comm: Communicator, device: Device, count: int) -> int:
    """The least `count` of any rank."""
    counts = comm.gather(torch.tensor([count], device=device.torch_device), 0)
    return int(comm.broadcast(counts.min()[None]).item())
