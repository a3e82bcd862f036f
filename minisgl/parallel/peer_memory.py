"""`PeerMemory`: all-reduce between the GPUs of one machine, by our own kernels in mapped memory.

Sums that the kernels do not take, and all other collectives, go to a `TorchGroup`.
"""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta

import torch
import torch.distributed as dist

from minisgl.kernels.all_reduce.memory import (
    HostWord,
    MappedBuffer,
    PeerBuffer,
    check_peer_access,
    runtime_call,
)
from minisgl.kernels.all_reduce.multicast import (
    Multicast,
    listen,
    receive_descriptor,
    send_descriptor,
    supports_multicast,
)
from minisgl.kernels.all_reduce.peers import BLOCKS, Peers, Segment, native_module
from minisgl.log import get_logger
from minisgl.parallel import Communicator
from minisgl.parallel.torch_group import TorchGroup
from minisgl.trace import ranged

log = get_logger(__name__)

CLOSE_WAIT = timedelta(seconds=0.3)  # that a closing rank waits for the others
TIMEOUT = 1800.0  # seconds a kernel waits for a peer that lives: loading may take one far longer


class PeerMemory(Communicator):
    """One rank of several GPUs. `close` gives back `resources`; all ranks are to call it."""

    def __init__(self, group: Communicator, peers: Peers, resources: ExitStack) -> None:
        super().__init__(group.rank, group.size, group.ordered)
        self._group = group
        self._peers = peers
        self._resources = resources

    @ranged("all_reduce", is_detail=True)
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total = self._peers.all_reduce(x)
        return self._group.all_reduce(x) if total is None else total

    @ranged("all_reduce_norm", is_detail=True)
    def all_reduce_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        unit_offset: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = self._peers.all_reduce_norm(x, residual, weight, eps, unit_offset)
        if both is None:
            return super().all_reduce_norm(x, residual, weight, eps, unit_offset)
        return both

    def gather(self, x: torch.Tensor, width: int | None = None) -> torch.Tensor:
        return self._group.gather(x, width)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.broadcast(x)

    def check(self) -> None:
        self._peers.check()
        self._group.check()

    def abort(self) -> None:
        self._peers.abort()
        self._group.abort()

    def close(self) -> None:
        try:
            self._resources.close()
        except RuntimeError as error:  # of a device that failed; the process's end frees all
            log.warning("memory of other ranks was not given back: %s", error)
        self._group.close()


class Refused(RuntimeError):
    """A step did not succeed on some rank, which is named."""


class Consensus:
    """Steps that ranks take together: each gets the answers of all, or all get the same error."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store = store
        self.rank = rank
        self.size = size

    def step(self, name: str, action: Callable[[], bytes | None]) -> list[bytes]:
        """What `action` returned on every rank. Refused, on every rank, if it raised on any."""
        try:
            answer = b"+" + (action() or b"")
        except Exception as error:  # of any library: the others must be told
            answer = b"-" + (str(error) or repr(error)).encode()
        self._store.set(f"{name}/{self.rank}", answer)
        answers = [self._store.get(f"{name}/{rank}") for rank in range(self.size)]
        for rank, told in enumerate(answers):
            if told[:1] != b"+":
                raise Refused(f"rank {rank}: {told[1:].decode(errors='replace')}")
        return [told[1:] for told in answers]

    def all_closing(self) -> bool:
        """Whether every rank gets here within a short wait: one may be gone, or be late."""
        try:
            self._store.set(f"close/{self.rank}", b"")
            self._store.wait([f"close/{rank}" for rank in range(self.size)], CLOSE_WAIT)
        except RuntimeError as error:
            log.debug("not all ranks are closing their memory: %s", error)
            return False
        return True


def connect_peers(
    group: TorchGroup, store: dist.Store, device: torch.device, timeout: float = TIMEOUT
) -> Communicator:
    """`group` with sums through peer memory, or `group` itself where that cannot be (logged).

    store: with no keys of others. Every rank of the group calls this; all are on one machine, and
    each has its device as the current one. timeout: seconds a kernel waits for a peer.
    """
    consensus = Consensus(store, group.rank, group.size)
    resources = ExitStack()
    try:
        peers = open_peers(consensus, resources, device, ordered=group.ordered, timeout=timeout)
    except Refused as refusal:
        resources.close()
        if group.rank == 0:
            log.warning("all-reduce by NCCL alone, slower at decode sizes: %s", refusal)
        return group
    return PeerMemory(group, peers, resources)


def open_peers(
    consensus: Consensus,
    resources: ExitStack,
    device: torch.device,
    *,
    ordered: bool,
    timeout: float,
    blocks: int = BLOCKS,
) -> Peers:
    """This rank's end, with memory mapped on all ranks. Refused, on all, where it cannot be."""
    index = device.index
    devices = _device_indices(consensus, device)
    native = native_module(device)
    segment = Segment(native.SIGNAL_BYTES)
    addresses = _share_memory(consensus, resources, devices, segment.num_bytes)
    multicast = None if ordered else _open_multicast(consensus, resources, index, segment)
    ends: list[Peers] = []

    def finish() -> None:
        word = HostWord()
        resources.callback(word.close)
        resources.callback(torch.cuda.synchronize, device)
        resources.callback(runtime_call, "cudaSetDevice", index)  # of the thread that closes
        ends.append(
            Peers(
                native,
                consensus.rank,
                addresses,
                word,
                stream=lambda: torch.cuda.current_stream(device).cuda_stream,
                segment=segment,
                multicast=multicast,
                ordered=ordered,
                blocks=blocks,
                timeout=timeout,
            )
        )

    consensus.step("finish", finish)
    return ends[0]


def _device_indices(consensus: Consensus, device: torch.device) -> list[int]:
    """The index of every rank's GPU."""

    def prepare() -> bytes:
        most = native_module(device).MAX_RANKS
        if consensus.size > most:
            raise ValueError(f"there may be {most} ranks, got {consensus.size}")
        return str(device.index).encode()

    return [int(answer) for answer in consensus.step("device", prepare)]


def _share_memory(
    consensus: Consensus, resources: ExitStack, devices: list[int], num_bytes: int
) -> list[int]:
    """Addresses on this rank of `num_bytes` of memory of every rank, its own included."""
    rank = consensus.rank
    made: list[PeerBuffer] = []

    def allocate() -> bytes:
        runtime_call("cudaSetDevice", devices[rank])
        check_peer_access(devices[rank], devices)
        buffer = PeerBuffer(num_bytes)
        made.append(buffer)
        return buffer.handle()

    def free() -> None:
        if consensus.all_closing():  # else a peer may have it mapped; the process's end frees it
            made[0].close()

    try:
        handles = consensus.step("allocate", allocate)
    except Refused:
        for buffer in made:
            buffer.close()
        raise
    resources.callback(free)  # last, since closing goes backwards
    addresses: list[int] = []

    def map_peers() -> None:
        for peer, handle in enumerate(handles):
            if peer == rank:
                addresses.append(made[0].address)
            else:
                mapped = MappedBuffer(handle)
                resources.callback(mapped.close)
                addresses.append(mapped.address)

    consensus.step("map", map_peers)
    return addresses


def _open_multicast(
    consensus: Consensus, resources: ExitStack, index: int, segment: Segment
) -> tuple[int, int] | None:
    """(address of all replicas, of this rank's); None where the devices have no multicast."""
    made: list[Multicast] = []

    def begin() -> None:
        if not supports_multicast(index):
            raise RuntimeError(f"GPU {index} has no multicast")
        made.append(Multicast(index, consensus.size, 2 * segment.half_bytes))
        resources.callback(made[0].close)

    try:
        consensus.step("multicast", begin)
        with ExitStack() as passing:
            _pass_object(consensus, made[0], passing)
        consensus.step("join", made[0].join)
        consensus.step("bind", made[0].bind)
    except Refused as refusal:
        log.debug("no all-reduce by NVLink multicast: %s", refusal)
        return None
    return made[0].address, made[0].replica


def _pass_object(consensus: Consensus, multicast: Multicast, passing: ExitStack) -> None:
    """Send the multicast object from rank 0, which creates it, to the others."""
    servers: list[tuple[socket.socket, int]] = []

    def create() -> bytes:
        if consensus.rank != 0:
            return b""
        descriptor = multicast.create()
        passing.callback(os.close, descriptor)
        server, name = listen()
        passing.enter_context(server)
        servers.append((server, descriptor))
        return name

    name = consensus.step("object", create)[0]

    def hand_over() -> None:
        if consensus.rank == 0:
            send_descriptor(*servers[0], consensus.size - 1)
        else:
            multicast.receive(receive_descriptor(name))

    consensus.step("descriptor", hand_over)
