"""`TorchGroup`: torch's own process groups, NCCL between GPUs and gloo between CPUs."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minisgl.device.tape import by_call
from minisgl.parallel import Communicator
from minisgl.trace import ranged

TIMEOUT = timedelta(minutes=30)  # as torch's own: a rank may load far longer than another


class TorchGroup(Communicator):
    """Ranks that connect through `store`, which holds no keys of others.

    With `ordered`, sums are taken in rank order from what all ranks send each other; without, by
    the backend, in an order that depends on the size and the machines.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        *,
        ordered: bool = False,
        host: str = "127.0.0.1",
        timeout: timedelta = TIMEOUT,
    ) -> None:
        """host: the address of this machine that the others reach."""
        super().__init__(rank, size, ordered)
        # The group itself, of no global registry: a process may have several engines in turn.
        self._group: Any
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, size, nccl)
        else:
            gloo = dist.ProcessGroupGloo._Options()
            gloo._timeout = timeout
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            self._group = dist.ProcessGroupGloo(store, rank, size, gloo)

    @by_call
    @ranged("all_reduce", is_detail=True)
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if not self.ordered:
            self._group.allreduce([x]).wait()
            return x
        everyone = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([everyone], [x]).wait()
        total = everyone[0].float()
        for other in everyone[1:]:
            total += other
        return total.to(x.dtype)

    @by_call
    @ranged("gather", is_detail=True)
    def gather(self, x: torch.Tensor, width: int | None = None) -> torch.Tensor:
        x = x.contiguous()
        if self.rank != 0:
            self._group.gather([], [x], dist.GatherOptions()).wait()
            return x
        everyone = [torch.empty_like(x) for _ in range(self.size)]
        self._group.gather([everyone], [x], dist.GatherOptions()).wait()
        width, each = width or self.size * x.shape[-1], x.shape[-1]
        return torch.cat([y[..., : max(width - r * each, 0)] for r, y in enumerate(everyone)], -1)

    @by_call
    @ranged("broadcast", is_detail=True)
    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        self._group.broadcast([x], dist.BroadcastOptions()).wait()
        return x

    def abort(self) -> None:
        """Aborts NCCL. gloo cannot be aborted, but fails once the others' sockets close."""
        self._group.abort()

    def close(self) -> None:
        self._group.shutdown()
