"""The all-reduce kernels on one GPU: ranks that are streams, and ranks that are processes."""

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Concatenate, ParamSpec, TypeVar

import pytest
import torch
import torch.distributed as dist

# Without them the kernels are neither built nor is memory shared.
pytest.importorskip("pybind11")
pytest.importorskip("ninja")
pytest.importorskip("cuda")

from minisgl.kernels.all_reduce import SumPath, all_reduce_norm_reference, all_reduce_reference
from minisgl.kernels.all_reduce.peers import Peers
from minisgl.kernels.all_reduce.virtual import VirtualRanks
from minisgl.parallel.peer_memory import Consensus, open_peers
from tests.kernels.cards import check_floats

pytestmark = pytest.mark.gpu

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (SumPath.ONE_SHOT, SumPath.TWO_SHOT)
SHAPES = [(1, 8), (3, 1000), (7, 4096), (64, 5120), (300, 2048)]
BLOCKS = 8  # a rank: eight ranks fit on any data-centre GPU


@pytest.fixture(scope="module")
def device(gpu_only: None) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=[2, 3, 8])
def ranks(request: pytest.FixtureRequest, device: torch.device) -> Iterator[VirtualRanks]:
    made = VirtualRanks(request.param, device, blocks=BLOCKS)
    yield made
    made.close()


def parts(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[size, *shape] on the GPU, of magnitudes that differ: another order of additions shows."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(size, *shape, generator=generator, device="cuda")
    scales = torch.tensor([10.0 ** (rank % 3) for rank in range(size)], device="cuda")
    return (values * scales.view(-1, *[1] * len(shape))).to(dtype)


def summed(peers: Peers, x: torch.Tensor, path: SumPath) -> torch.Tensor:
    total = peers.all_reduce(x, path)
    assert total is not None
    return total


def normed(
    peers: Peers,
    x: torch.Tensor,
    path: SumPath,
    residual: torch.Tensor,
    weight: torch.Tensor,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised sum, sum)."""
    both = peers.all_reduce_norm(x, residual, weight, 1e-6, unit_offset, path)
    assert both is not None
    return both


def on_own(
    call: Callable[Concatenate[Peers, torch.Tensor, P], T],
    given: list[torch.Tensor],
    *args: P.args,
    **kwargs: P.kwargs,
) -> Callable[[Peers], T]:
    """`call` of each rank on its own tensor."""
    return lambda peers: call(peers, given[peers.rank], *args, **kwargs)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_in_rank_order_to_the_bit(
    ranks: VirtualRanks, path: SumPath, dtype: torch.dtype
) -> None:
    size = len(ranks.ranks)
    for seed, shape in enumerate([*SHAPES, (5, 13)]):  # the last one is no whole number of packs
        given = parts(size, shape, dtype, seed)
        want = all_reduce_reference(given)
        copies = [given[rank].clone() for rank in range(size)]
        torch.cuda.synchronize()
        sums = ranks.run(on_own(summed, copies, path))
        torch.cuda.synchronize()
        ranks.check()
        for total in sums:
            assert torch.equal(total, want), shape


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_norm_is_as_good_as_torch_and_alike_everywhere(
    ranks: VirtualRanks, dtype: torch.dtype, unit_offset: bool
) -> None:
    size = len(ranks.ranks)
    for seed, shape in enumerate(SHAPES):
        given = parts(size, shape, dtype, seed)
        residual, weight = parts(1, shape, dtype, 50)[0], parts(1, shape[1:], dtype, 51)[0]
        plain, want_sum = all_reduce_norm_reference(given, residual, weight, 1e-6, unit_offset)
        wide = want_sum.double()
        exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        exact = exact * (weight.double() + unit_offset)
        seen = []
        for path in PATHS:
            copies = [given[rank].clone() for rank in range(size)]
            torch.cuda.synchronize()
            seen += ranks.run(on_own(normed, copies, path, residual, weight, unit_offset))
            torch.cuda.synchronize()
        ranks.check()
        for norm, total in seen:
            assert torch.equal(total, want_sum), shape
            assert torch.equal(norm, seen[0][0]), shape
        check_floats(str(shape), seen[0][0], plain, exact)


def test_what_exceeds_the_capacity_is_cut_in_pieces(device: torch.device) -> None:
    ranks = VirtualRanks(2, device, ordered=True, blocks=BLOCKS, half_bytes=64 * 1024)
    given = parts(2, (41, 1024), torch.bfloat16, 0)
    residual, weight = parts(1, (41, 1024), torch.bfloat16, 1)[0], given[0, 0].clone()
    want = all_reduce_norm_reference(given, residual, weight, 1e-6, False)[1]
    # Piece by piece, since a call of virtual ranks may enqueue one kernel only.
    pieces = [slice(begin, begin + 32) for begin in range(0, 41, 32)]
    for piece in pieces:
        copies = [given[rank, piece].clone() for rank in range(2)]
        torch.cuda.synchronize()
        both = ranks.run(on_own(normed, copies, SumPath.TWO_SHOT, residual[piece], weight))
        torch.cuda.synchronize()
        for _, total in both:
            assert torch.equal(total, want[piece])
    ranks.check()
    ranks.close()


def test_a_captured_graph_replays_many_calls(device: torch.device) -> None:
    """Epochs advance on the device: one graph of several calls, replayed, between eager calls."""
    size, calls, shape = 4, 5, (16, 1024)
    ranks = VirtualRanks(size, device, blocks=BLOCKS)
    given = parts(size, shape, torch.bfloat16, 0)
    static = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(size)]
    out = [torch.empty_like(x) for x in static]
    residual, weight = (
        parts(1, shape, torch.bfloat16, 1)[0],
        parts(1, (1024,), torch.bfloat16, 2)[0],
    )
    for path in PATHS:  # loads the kernels, which a capture should not have to do
        ranks.run(on_own(summed, static, path))
        ranks.run(on_own(normed, static, path, residual, weight))
    graphs = []
    torch.cuda.synchronize()
    for peers, stream in zip(ranks.ranks, ranks.streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            x = static[peers.rank].clone()
            for call in range(calls):
                path = PATHS[call % 2]
                x, _ = normed(peers, summed(peers, x, path), path, residual, weight)
            out[peers.rank].copy_(x)
        graphs.append(graph)
    torch.cuda.synchronize()
    results = []
    for turn in range(3):
        for rank in range(size):
            static[rank].copy_(given[rank] * (turn + 1))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, ranks.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        ranks.check()
        assert all(torch.equal(x, out[0]) for x in out)
        results.append(out[0].clone())
        eager = [static[rank].clone() for rank in range(size)]
        torch.cuda.synchronize()
        sums = ranks.run(on_own(summed, eager, SumPath.ONE_SHOT))
        torch.cuda.synchronize()
        assert torch.equal(sums[0], all_reduce_reference(torch.stack(static)))
    x = torch.stack([given[rank] for rank in range(size)])
    for _ in range(calls):
        total = all_reduce_reference(x)
        x = all_reduce_norm_reference(total.expand(size, *shape), residual, weight, 1e-6, False)[
            0
        ].expand(size, *shape)
    torch.testing.assert_close(results[0].float(), x[0].float(), atol=0.05, rtol=0.02)
    assert not torch.equal(results[0], results[1])
    ranks.close()


def test_a_missing_rank_ends_the_wait_and_is_named(device: torch.device) -> None:
    ranks = VirtualRanks(3, device, blocks=BLOCKS, timeout=0.5)
    x = torch.ones(4, 1024, device=device)
    torch.cuda.synchronize()
    ranks.run(lambda peers: peers.all_reduce(x.clone(), SumPath.ONE_SHOT), ranks=[0, 1])
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="waited for rank 2 in vain"):
        ranks.check()
    ranks.close()


def test_the_host_ends_a_wait(device: torch.device) -> None:
    ranks = VirtualRanks(2, device, blocks=BLOCKS, timeout=600)
    x = torch.ones(4, 1024, device=device)
    torch.cuda.synchronize()
    ranks.run(lambda peers: peers.all_reduce(x, SumPath.ONE_SHOT), ranks=[0])
    ranks.ranks[0].abort()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="stopped"):
        ranks.check()
    ranks.close()


def _process(rank: int, size: int, port: int, answers: Any) -> None:
    """One rank in a process of its own, on the GPU that it shares with the others."""
    torch.cuda.set_device(0)
    device = torch.device("cuda", 0)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    resources = ExitStack()
    consensus = Consensus(store, rank, size)
    peers = open_peers(consensus, resources, device, ordered=True, timeout=60, blocks=4)
    equal = []
    for seed, shape in enumerate([(1, 64), (9, 1000), (40, 4096), (3, 8)] * 2):
        given = parts(size, shape, torch.bfloat16, seed)
        for path in PATHS:
            total = summed(peers, given[rank].clone(), path)
            torch.cuda.synchronize()
            peers.check()
            equal.append(torch.equal(total, all_reduce_reference(given)))
    answers.put((rank, equal))
    consensus.step("done", lambda: None)  # the store is rank 0's
    resources.close()
    consensus.step("closed", lambda: None)


@pytest.mark.usefixtures("gpu_only")
def test_two_processes_share_memory_by_handles() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_process, args=(rank, 2, port, answers)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        seen = dict(answers.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert all(all(equal) for equal in seen.values()), seen
