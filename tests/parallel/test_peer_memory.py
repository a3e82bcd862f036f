"""The GPU all-reduce as far as a machine without GPUs shows it: choice, checks, setting up."""

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from minisgl.kernels.all_reduce import (
    CAPACITY,
    LARGEST_CALLS,
    SumPath,
    all_reduce_norm_reference,
    all_reduce_reference,
    choose,
    multicast,
    received_bytes,
)
from minisgl.kernels.all_reduce.memory import HostWord, PeerBuffer
from minisgl.kernels.all_reduce.peers import STOPPED, Peers, Segment
from minisgl.kernels.rmsnorm import rmsnorm_reference
from minisgl.parallel import Communicator, peer_memory
from minisgl.parallel.peer_memory import Consensus, PeerMemory, Refused, open_peers

SIZES = [16, 1 << 16, 1 << 19, (1 << 19) + 16, CAPACITY, CAPACITY + 16, 1 << 30]
C_TYPES = {0: torch.bfloat16, 1: torch.float16, 2: torch.float32}


def tensor_at(address: int, num_bytes: int, code: int) -> torch.Tensor:
    raw = (ctypes.c_char * num_bytes).from_address(address)
    return torch.frombuffer(raw, dtype=C_TYPES[code])


class Rank:
    """Stands in for the kernels: all ranks hold what this one holds. Notes `calls`."""

    def __init__(self, calls, rank, signals, data, everywhere, replica, half, *_):
        self.size, self.half, self.calls = len(signals), half, calls
        assert [d - s for d, s in zip(data, signals, strict=True)] == [256] * self.size

    def all_reduce(self, path, code, source, out, num_bytes, stream):
        assert source % 16 == out % 16 == num_bytes % 16 == 0
        assert 0 < num_bytes <= self.half
        assert stream == 7
        self.calls.append((path, num_bytes))
        parts = tensor_at(source, num_bytes, code).expand(self.size, -1)
        tensor_at(out, num_bytes, code).copy_(all_reduce_reference(parts))

    def all_reduce_norm(
        self, path, code, x, residual, weight, out, total, rows, row_bytes, eps, offset, stream
    ):
        assert all(address % 16 == 0 for address in (x, residual, weight, out, total, row_bytes))
        assert 0 < rows * row_bytes <= self.half
        self.calls.append((path, rows))
        take = [tensor_at(a, rows * row_bytes, code).view(rows, -1) for a in (x, residual)]
        parts = take[0].expand(self.size, -1, -1).clone()
        scale = tensor_at(weight, row_bytes, code)
        both = all_reduce_norm_reference(parts, take[1], scale, eps, offset)
        for address, result in zip((out, total), both, strict=True):
            tensor_at(address, rows * row_bytes, code).view(rows, -1).copy_(result)


def native(calls: list) -> SimpleNamespace:
    """The module of kernels."""
    made = partial(Rank, calls)
    return SimpleNamespace(Rank=made, MAX_ROW_BYTES=47 * 1024, MAX_RANKS=8, SIGNAL_BYTES=200)


def make_peers(
    size: int = 2, half_bytes: int = CAPACITY, *, calls: list | None = None, word=None, **facts
) -> Peers:
    module = native([] if calls is None else calls)
    return Peers(
        module,
        0,
        [4096 * (rank + 1) for rank in range(size)],
        word or SimpleNamespace(value=0, address=8),
        stream=lambda: 7,
        segment=Segment(module.SIGNAL_BYTES, half_bytes),
        timeout=1.0,
        **facts,
    )


# ---- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", range(2, 9))
def test_paths_fit_their_modes(ranks):
    for size in SIZES:
        for has in (False, True):
            fixed = choose(size, ranks, multimem=has, ordered=True)
            assert fixed in (SumPath.ONE_SHOT, SumPath.TWO_SHOT)
            free = choose(size, ranks, multimem=has, ordered=False)
            assert has or free is not SumPath.MULTIMEM
            if size > CAPACITY:
                assert free is None
        assert choose(size, ranks, multimem=True, ordered=True) == fixed
    assert choose(16, ranks, multimem=True, ordered=False) is SumPath.ONE_SHOT


def test_no_path_is_offered_more_than_it_holds():
    for limits in LARGEST_CALLS.values():
        assert max(limits.one_shot, limits.two_shot, limits.multimem) <= CAPACITY


def test_two_shot_calls_receive_less_from_three_ranks_on():
    for ranks in range(2, 9):
        one, two, switch = (received_bytes(840 * 16, ranks, path) for path in SumPath)
        assert one == (ranks - 1) * 840 * 16
        assert (two < one) == (ranks > 2)
        assert (switch < two) == (ranks > 3)


# ---- the specification ------------------------------------------------------------------------


def test_the_reference_adds_in_rank_order():
    parts = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    assert all_reduce_reference(parts).item() == 1.0  # the first 1 is lost, the second is not
    assert all_reduce_reference(parts.flip(0)).item() == 0.0


def test_the_reference_of_both_is_one_after_the_other():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 5, 72, generator=generator).bfloat16()
    residual = torch.randn(5, 72, generator=generator).bfloat16()
    weight = torch.randn(72, generator=generator).bfloat16()
    both = all_reduce_norm_reference(parts, residual, weight, 1e-5, True)
    apart = rmsnorm_reference(all_reduce_reference(parts), weight, 1e-5, residual, True)
    assert all(map(torch.equal, both, apart))


# ---- one rank's end ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", C_TYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 8), (33, 100)])
def test_any_shape_is_summed(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    total = make_peers(3).all_reduce(x.clone())
    assert torch.equal(total, all_reduce_reference(x.expand(3, *shape)))
    assert total.shape == x.shape


def test_views_that_kernels_cannot_read_are_copied():
    x = torch.arange(64.0).view(8, 8)
    peers = make_peers()
    assert torch.equal(peers.all_reduce(x.clone().t()), 2 * x.t())
    odd = torch.arange(65.0)[1:]  # 4 bytes off a multiple of 16
    assert torch.equal(peers.all_reduce(odd), 2 * torch.arange(1.0, 65.0))


def test_large_calls_are_cut_in_the_ordered_mode_only():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    calls = []
    peers = make_peers(ordered=True, half_bytes=1024, calls=calls)
    assert torch.equal(peers.all_reduce(x.clone()), x + x)
    assert [size for _, size in calls] == [1024, 1024, 1024, 928]
    assert make_peers(4).all_reduce(torch.zeros(CAPACITY)) is None  # NCCL's
    rows, residual, weight = torch.randn(9, 64), torch.zeros(9, 64), torch.ones(64)
    normed, total = peers.all_reduce_norm(rows.clone(), residual, weight, 1e-6, False)
    assert [count for _, count in calls[4:]] == [4, 4, 1]
    assert torch.equal(total, rows + rows)
    assert torch.equal(normed, rmsnorm_reference(total, weight, 1e-6))


def test_what_kernels_do_not_cover_is_not_taken():
    calls = []
    peers = make_peers(calls=calls)
    assert peers.all_reduce(torch.zeros(8, dtype=torch.float64)) is None
    assert peers.all_reduce(torch.zeros(0, 8)).shape == (0, 8)
    for size in (12, 24 * 1024):  # no whole pack, too long for shared memory
        x = torch.zeros(2, size, dtype=torch.bfloat16)
        assert peers.all_reduce_norm(x, x, x[0], 1e-6, False) is None
    empty = torch.zeros(0, 64)
    normed, total = peers.all_reduce_norm(empty, empty, torch.ones(64), 1e-6, False)
    assert normed.shape == total.shape == (0, 64)
    assert calls == []


def test_arguments_that_do_not_fit_are_named():
    peers, x = make_peers(), torch.zeros(2, 64)
    with pytest.raises(ValueError, match=r"residual must be like x \[2, 64\], got \[3, 64\]"):
        peers.all_reduce_norm(x, torch.zeros(3, 64), x[0], 1e-6, False)
    with pytest.raises(ValueError, match=r"weight must be \[64\] torch.float32, got \[32\]"):
        peers.all_reduce_norm(x, x, torch.zeros(32), 1e-6, False)


def test_a_fault_is_raised_by_name():
    word = SimpleNamespace(value=0, address=8)
    peers = make_peers(word=word)
    peers.check()
    word.value = 0x100 | 5 << 4 | 3
    with pytest.raises(RuntimeError, match="rank 5 waited for rank 3 in vain"):
        peers.check()
    peers.abort()
    assert word.value == STOPPED
    with pytest.raises(RuntimeError, match="stopped"):
        peers.check()


class Nccl(Communicator):
    """Stands in for the group beside: counts what it is given."""

    def __init__(self) -> None:
        super().__init__(0, 2, ordered=False)
        self.sums = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        return x + x


def test_the_group_takes_what_the_kernels_do_not():
    group = Nccl()
    comm = PeerMemory(group, make_peers(), ExitStack())
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(comm.all_reduce(x.clone()), x + x)
    assert group.sums == 0
    assert torch.equal(comm.all_reduce(x.double()), (x + x).double())
    assert group.sums == 1
    for size in (12, 10):  # the last one is no whole number of packs: sum, then norm
        part, weight = x[:, :size].contiguous(), torch.ones(size)
        normed, total = comm.all_reduce_norm(part.clone(), part, weight, 1e-6, False)
        assert torch.equal(total, 3 * part)
        torch.testing.assert_close(normed, rmsnorm_reference(total, weight, 1e-6))
    assert group.sums == 1


# ---- setting up -------------------------------------------------------------------------------


def together(size: int, body) -> list:
    """`body(consensus)` of every rank, each in a thread; what it returned or raised."""
    store = dist.HashStore()

    def run(rank: int):
        try:
            return body(Consensus(store, rank, size))
        except Refused as refusal:
            return refusal

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def test_a_refusal_on_one_rank_is_heard_by_all():
    def body(consensus: Consensus) -> list[bytes]:
        heard = consensus.step("first", lambda: b"%d" % consensus.rank)
        assert heard == [b"0", b"1", b"2"]

        def fail() -> None:
            if consensus.rank == 1:
                raise OSError("no memory")

        return consensus.step("second", fail)

    assert [str(told) for told in together(3, body)] == ["rank 1: no memory"] * 3


@pytest.fixture
def memory(monkeypatch) -> list[tuple[str, int]]:
    """Peer memory that is only numbers; the events of its life."""
    events: list[tuple[str, int]] = []
    lock, addresses = threading.Lock(), iter(range(4096, 1 << 30, 4096))

    class Buffer:
        def __init__(self, num_bytes: int) -> None:
            with lock:
                self.address = next(addresses)

        def handle(self) -> bytes:
            return b"%d" % self.address

        def close(self) -> None:
            events.append(("freed", self.address))

    class Mapped:
        def __init__(self, handle: bytes) -> None:
            self.address = int(handle)

        def close(self) -> None:
            events.append(("unmapped", self.address))

    class Word:
        value, address = 0, 8

        def close(self) -> None:
            pass

    monkeypatch.setattr(peer_memory, "native_module", lambda device: native([]))
    monkeypatch.setattr(peer_memory, "runtime_call", lambda *arguments: None)
    monkeypatch.setattr(peer_memory, "check_peer_access", lambda device, peers: None)
    monkeypatch.setattr(peer_memory, "supports_multicast", lambda device: False)
    monkeypatch.setattr(peer_memory, "PeerBuffer", Buffer)
    monkeypatch.setattr(peer_memory, "MappedBuffer", Mapped)
    monkeypatch.setattr(peer_memory, "HostWord", Word)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return events


def test_ranks_map_each_other_and_free_nothing_that_is_mapped(memory):
    def body(consensus: Consensus) -> list[int]:
        resources = ExitStack()
        device = torch.device("cuda", consensus.rank)
        peers = open_peers(consensus, resources, device, ordered=False, timeout=1.0)
        assert (peers.rank, peers.size) == (consensus.rank, 3)
        consensus.step("used", lambda: None)
        resources.close()
        return []

    assert together(3, body) == [[]] * 3
    for address in {address for _, address in memory}:
        life = [what for what, of in memory if of == address]
        assert life == ["unmapped", "unmapped", "freed"]


def test_without_access_all_ranks_go_on_without(memory, monkeypatch, caplog):
    def refuse(device: int, peers: list[int]) -> None:
        if device == 1:
            raise RuntimeError("GPU 1 reaches GPU 0 over PCIe, not NVLink")

    monkeypatch.setattr(peer_memory, "check_peer_access", refuse)
    store = dist.HashStore()

    def connect(rank: int):
        group = SimpleNamespace(rank=rank, size=2, ordered=False)
        device = torch.device("cuda", rank)
        return peer_memory.connect_peers(group, store, device) is group

    with caplog.at_level("WARNING", "minisgl"), ThreadPoolExecutor(2) as pool:
        assert list(pool.map(connect, range(2))) == [True, True]
    (record,) = caplog.records
    assert "rank 1: GPU 1 reaches GPU 0 over PCIe" in record.getMessage()
    assert [what for what, _ in memory] == ["freed"]  # rank 0's own


def test_a_descriptor_travels_between_processes_of_one_user():
    server, name = multicast.listen()
    reader, writer = os.pipe()
    with server, ThreadPoolExecutor(3) as pool:
        sent = pool.submit(multicast.send_descriptor, server, writer, 2)
        received = [pool.submit(multicast.receive_descriptor, name) for _ in range(2)]
        copies = [task.result(30) for task in received]
        sent.result(30)
    for number, copy in enumerate(copies):
        os.write(copy, b"%d" % number)
        os.close(copy)
    os.close(writer)
    assert os.read(reader, 8) == b"01"
    os.close(reader)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("make", [lambda: PeerBuffer(64), HostWord])
def test_without_a_gpu_cuda_functions_say_so(make):
    with pytest.raises(RuntimeError):
        make()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_multicast_is_made_in_the_order_that_the_driver_wants(monkeypatch, rank):
    """The driver is imitated; the structures that it is given are cuda-python's own."""
    calls: list[tuple[str, tuple]] = []
    answers = {
        "cuMulticastGetGranularity": 1 << 21,
        "cuMulticastCreate": "object",
        "cuMemExportToShareableHandle": 77,
        "cuMemImportFromShareableHandle": "object",
        "cuDeviceGet": "device",
        "cuMemCreate": "memory",
    }
    addresses = iter((1 << 40, 1 << 41))

    def driver_call(name: str, *arguments):
        calls.append((name, arguments))
        return next(addresses) if name == "cuMemAddressReserve" else answers.get(name)

    monkeypatch.setattr(multicast, "driver_call", driver_call)
    made = multicast.Multicast(3, 2, (1 << 24) + 1)
    if rank == 0:
        assert made.create() == 77
        assert calls[-2][1][0].size == (1 << 24) + (1 << 21)  # whole granules
        assert calls[-2][1][0].numDevices == 2
    else:
        reader, writer = os.pipe()
        os.close(writer)
        made.receive(reader)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(reader)
    made.join()
    made.bind()
    assert (made.replica, made.address) == (1 << 40, 1 << 41)
    made.close()
    made.close()  # undone once
    size = (1 << 24) + (1 << 21)
    mapped = ["cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]
    assert [name for name, _ in calls][3 - rank :] == [
        *("cuDeviceGet", "cuMulticastAddDevice", "cuMemCreate", "cuMulticastBindMem"),
        *(mapped * 2),
        *(["cuMemUnmap", "cuMemAddressFree"] * 2),
        *(["cuMemRelease"] * 2),
    ]
    given = dict(calls)
    assert given["cuMulticastBindMem"] == ("object", 0, "memory", 0, size, 0)
    assert given["cuMemCreate"][1].location.id == 3
    assert given["cuMemMap"] == (1 << 41, size, 0, "object", 0)


def test_memory_is_kept_where_a_peer_does_not_come_to_close(memory):
    """The other rank may have it mapped still."""

    def body(consensus: Consensus) -> None:
        resources = ExitStack()
        device = torch.device("cuda", consensus.rank)
        open_peers(consensus, resources, device, ordered=True, timeout=1.0)
        if consensus.rank == 0:
            resources.close()

    together(2, body)
    assert [what for what, _ in memory] == ["unmapped"]
