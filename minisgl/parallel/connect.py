"""`connect`: the one place that chooses how ranks communicate."""

import torch
import torch.distributed as dist

from minisgl.parallel import Communicator
from minisgl.parallel.peer_memory import connect_peers
from minisgl.parallel.shared_memory import SharedMemory
from minisgl.parallel.torch_group import TorchGroup


def connect(
    device: torch.device,
    rank: int,
    size: int,
    *,
    local_size: int,
    store: dist.Store | None,
    shared: int | None,
    ordered: bool,
    host: str | None = None,
) -> Communicator:
    """The communicator of one rank; returns once all are connected.

    local_size: ranks per machine. shared: descriptor of memory that ranks on one machine's CPUs
    map, where they have such. store: through which other ranks, and GPUs, connect. host: this
    machine's address for the others. ordered: sums must be taken in rank order at every size.
    """
    if size == 1:
        return Communicator()
    if shared is not None:
        return SharedMemory(shared, rank, size)
    if store is None:
        raise ValueError("ranks without shared memory need a store to connect through")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    group = TorchGroup(store, rank, size, device, ordered=ordered, host=host)
    group.all_reduce(torch.zeros(1, device=device))  # NCCL connects at its first sum
    if device.type != "cuda" or local_size != size:
        return group
    return connect_peers(group, dist.PrefixStore("peer_memory", store), device)
