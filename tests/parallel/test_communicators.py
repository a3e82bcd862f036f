"""Every communicator for CPUs keeps the protocol's promises; the ranks here are threads."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minisgl import csrc
from minisgl.parallel import Communicator, shared_memory
from minisgl.parallel.shared_memory import SLOT_BYTES, SharedMemory
from minisgl.parallel.torch_group import TorchGroup

NATIVE = csrc.load("rank_ops", wait=True)
KINDS = ["gloo", "gloo-ordered"]
if NATIVE is not None:
    KINDS.append("shared")
needs_native = pytest.mark.skipif(NATIVE is None, reason="no C++ compiler or Python headers")
Body = Callable[[Communicator], Any]


class Ranks:
    """`size` communicators of one kind; `run` calls a function with each, in a thread of its own"""

    def __init__(self, kind: str, size: int, seconds: float = 60) -> None:
        self.kind, self.size, self.seconds = kind, size, seconds
        self.store = dist.HashStore()
        self.fd = shared_memory.create(size) if kind == "shared" else -1
        self.pool = ThreadPoolExecutor(size)
        self.comms = list(self.pool.map(self.join, range(size)))

    def join(self, rank: int) -> Communicator:
        if self.kind == "shared":
            return SharedMemory(self.fd, rank, self.size, self.seconds)
        return TorchGroup(
            self.store,
            rank,
            self.size,
            torch.device("cpu"),
            ordered=self.kind == "gloo-ordered",
            host="127.0.0.1",
            timeout=timedelta(seconds=self.seconds),
        )

    def run(self, body: Body) -> list[Any]:
        return [task.result(60) for task in [self.pool.submit(body, comm) for comm in self.comms]]

    def close(self) -> None:
        for comm in self.comms:
            comm.close()
        self.pool.shutdown()
        if self.fd >= 0:
            os.close(self.fd)


@pytest.fixture(params=[(kind, size) for kind in KINDS for size in (2, 3)], ids=str)
def ranks(request) -> Iterator[Ranks]:
    made = Ranks(*request.param)
    yield made
    made.close()


def inputs(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """One tensor per rank, of magnitudes that differ: another order of additions shows."""
    generator = torch.Generator().manual_seed(len(shape) + size)
    scales = [10.0 ** (rank % 3 * 2) for rank in range(size)]
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for scale in scales]


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


SHAPES = [(1,), (15,), (3, 17), (2, SLOT_BYTES // 8 + 3), (0, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_right_and_the_same_everywhere(ranks: Ranks, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        given = inputs(ranks.size, shape, dtype)
        sums = ranks.run(lambda comm, given=given: comm.all_reduce(given[comm.rank].clone()))
        in_order = given[0].float()
        for x in given[1:]:
            in_order = in_order + x.float()
        for total in sums:
            assert total.dtype == dtype
            assert torch.equal(total, sums[0])
            if ranks.comms[0].ordered:
                assert torch.equal(total, in_order.to(dtype))
        exact = torch.stack(given).double().sum(0)
        bound = 4 * eps(dtype) * torch.stack(given).abs().double().sum(0)
        assert ((sums[0].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_norm_of_the_sum_is_the_norm_of_the_sum(ranks: Ranks, unit_offset: bool) -> None:
    csrc.load("model_ops", wait=True)  # or ranks, threads here, would differ in who finds it built
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs(ranks.size, (5, 72), dtype)
        residual, weight = inputs(2, (5, 72), dtype)[1], inputs(2, (72,), dtype)[0]
        both = ranks.run(
            lambda comm, g=given, r=residual, w=weight: comm.all_reduce_norm(
                g[comm.rank].clone(), r, w, 1e-5, unit_offset
            )
        )
        total = ranks.run(lambda comm, g=given: comm.all_reduce(g[comm.rank].clone()))[0] + residual
        scale = torch.rsqrt(total.double().square().mean(-1, keepdim=True) + 1e-5)
        exact = total.double() * scale * (weight.double() + unit_offset)
        for normed, summed in both:
            assert torch.equal(summed, total)
            assert torch.equal(normed, both[0][0])
            torch.testing.assert_close(normed.double(), exact, atol=0, rtol=4 * eps(dtype))


def test_rank_0_gathers_and_is_heard(ranks: Ranks) -> None:
    long = SLOT_BYTES // 8 + 1  # a row ends in the middle of what is sent at once
    for shape, cut in [((4, 3), 0), ((4, 3), 2), ((5,), 1), ((2, 5), 6), ((3, long), 3)]:
        given = inputs(ranks.size, shape, torch.float32)
        width = ranks.size * shape[-1] - cut
        joined = ranks.run(lambda comm, g=given, w=width: comm.gather(g[comm.rank], w))
        assert torch.equal(joined[0], torch.cat(given, -1)[..., :width])
        assert joined[0].is_contiguous()
        assert torch.equal(joined[1], given[1])
        ids = [torch.arange(7, dtype=torch.int32) + 100 * rank for rank in range(ranks.size)]
        for heard in ranks.run(lambda comm, ids=ids: comm.broadcast(ids[comm.rank].clone())):
            assert torch.equal(heard, ids[0])


def test_a_strided_tensor_is_summed_too(ranks: Ranks) -> None:
    given = inputs(ranks.size, (6, 5), torch.float32)
    sums = ranks.run(lambda comm: comm.all_reduce(given[comm.rank].clone().t()))
    torch.testing.assert_close(sums[0], torch.stack(given).sum(0).t())


def test_many_collectives_of_all_kinds_stay_in_step(ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        seen = []
        for i in range(60):
            size = int(torch.randint(1, 2000, (1,), generator=generator))
            x = torch.full((size,), float(comm.rank + i))
            if (comm.rank + i) % 7 == 0:
                time.sleep(0.001)
            seen += [comm.all_reduce(x.clone()), comm.broadcast(x.clone())]
            seen.append(comm.gather(x)[:1])
        return seen

    results = ranks.run(body)
    n = ranks.size
    for i in range(60):
        for seen in results:
            assert (seen[3 * i] == n * i + n * (n - 1) / 2).all()
            assert (seen[3 * i + 1] == i).all()


@needs_native
def test_a_wait_is_given_up_when_a_rank_is_gone_or_does_not_come() -> None:
    ranks = Ranks("shared", 3, seconds=1)
    said: list[str] = []

    def wait(comm: Communicator) -> None:
        with pytest.raises(RuntimeError) as caught:
            comm.all_reduce(torch.ones(4))
        said.append(str(caught.value))

    waiting = [threading.Thread(target=wait, args=(comm,)) for comm in ranks.comms[:2]]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(30)
    assert said == ["rank 2 did not join a collective within 1 s"] * 2
    ranks.close()

    ranks = Ranks("shared", 3, seconds=600)
    said.clear()
    waiting = [threading.Thread(target=wait, args=(comm,)) for comm in ranks.comms[:2]]
    for thread in waiting:
        thread.start()
    ranks.comms[2].abort()
    for thread in waiting:
        thread.join(30)
    assert said == ["collectives were aborted: a rank has ended"] * 2
    ranks.close()
