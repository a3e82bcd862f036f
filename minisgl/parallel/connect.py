"""`connect`: the one place that chooses how ranks communicate."""

import torch
import torch.distributed as dist

from minisgl.config import EngineConfig
from minisgl.device import Device
from minisgl.parallel import Communicator
from minisgl.parallel.peer_memory import connect_peers
from minisgl.parallel.shared_memory import SharedMemory
from minisgl.parallel.torch_group import TorchGroup


def connect(
    config: EngineConfig,
    device: Device,
    rank: int,
    *,
    store: dist.Store | None,
    shared: int | None,
    host: str,
) -> Communicator:
    """The communicator of a rank, once all have connected.

    shared: descriptor of memory that ranks on one machine's CPUs map, where they have such. store:
    through which other ranks, and GPUs, connect. host: this machine's address for the others.
    Call it on any thread, not in the device's stream: it waits long for a rank that has ended.
    """
    where, size = device.torch_device, config.tp_size
    if size == 1:
        return Communicator()
    if shared is not None:
        return SharedMemory(shared, rank, size)
    if store is None:
        raise ValueError("ranks without shared memory need a store to connect through")
    if where.type == "cuda":
        torch.cuda.set_device(where)  # of this thread
    store = dist.PrefixStore("ranks", store)
    group = TorchGroup(store, rank, size, where, ordered=config.batch_invariant, host=host)
    group.all_reduce(torch.zeros(1, device=where))  # NCCL connects at its first sum
    if where.type != "cuda" or config.nnodes > 1:
        return group
    return connect_peers(group, dist.PrefixStore("peer_memory", store), where)
