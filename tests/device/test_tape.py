"""Tapes: replayed, they do what the function does, in memory that they share and give back."""

import gc
import logging
import sys
from collections.abc import Callable
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread

import numpy as np
import pytest
import torch

from minisgl import csrc
from minisgl.device.tape import Arena, TapeGraph, by_call
from minisgl.kernels.activation import silu_and_mul
from minisgl.kernels.linear import linear
from minisgl.kernels.rmsnorm import rmsnorm

NATIVE = csrc.load("model_ops", wait=True) is not None
pytestmark = pytest.mark.skipif(not NATIVE, reason="no compiler: nothing is recorded")


class Counted:
    """A function of static buffers, and how often Python has run it."""

    def __init__(self) -> None:
        self.calls = 0
        self.x = torch.zeros(5, 64)
        self.out = torch.zeros(5, 32)
        generator = torch.Generator().manual_seed(0)
        self.up = torch.randn(128, 64, generator=generator)
        self.down = torch.randn(64, 64, generator=generator)
        self.norm = torch.ones(64)

    def __call__(self) -> None:
        """Native ops, an operator of PyTorch between them, views, and what is called as a whole."""
        self.calls += 1
        hidden = silu_and_mul(linear(self.x, self.up))
        hidden, total = rmsnorm(hidden, self.norm, 1e-6, self.x)
        halves = linear(torch.cat([hidden, total * 2 + 1])[:5], self.down).chunk(2, dim=1)
        self.out.copy_(halves[0] * halves[1] + self.rank(halves[0]))

    @staticmethod
    @by_call
    def rank(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([row.index(max(row)) for row in x.tolist()])[:, None]


def test_a_replay_does_what_the_function_does() -> None:
    function, generator = Counted(), torch.Generator().manual_seed(1)
    graph = TapeGraph(function, Arena())
    with torch.inference_mode():
        for replay in range(5):
            function.x.copy_(torch.randn(5, 64, generator=generator))
            graph.replay()
            found = function.out.clone()
            assert function.calls == 1 + replay  # the first is recorded, the rest is Counted's own
            function()
            assert torch.equal(found, function.out)
            function.out.fill_(np.nan)


def test_the_log_names_once_what_tapes_call(caplog: pytest.LogCaptureFixture) -> None:
    @by_call
    def reads(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(x.tolist())

    with caplog.at_level(logging.INFO, "minisgl"), torch.inference_mode():
        x = torch.ones(3)
        reads(x)
        assert not caplog.messages
        for _ in range(2):
            TapeGraph(lambda: reads(x), Arena()).replay()
    [message] = caplog.messages
    assert "test_the_log_names_once_what_tapes_call.<locals>.reads" in message


def test_a_tape_knows_what_it_calls() -> None:
    """Copies of dense memory are not called: in either direction, of parts, and onto itself."""
    x, out, wide = torch.arange(12.0).view(3, 4), torch.zeros(3, 4), torch.zeros(3, 4).double()

    def copy() -> None:
        out[1:].copy_(x[:2])
        out[:1].copy_(out[2:])
        x.copy_(x)

    def convert() -> None:
        wide.copy_(x)
        wide[:, 1:].copy_(out[:, :3])
        wide.mul_(2)

    for function, called in ((copy, set()), (convert, {"aten.copy_.default", "aten.mul_.Tensor"})):
        graph = TapeGraph(function, Arena())
        with torch.inference_mode():
            graph.replay()
            assert graph.calls == called
            out.fill_(5.0)
            x.add_(1)
            graph.replay()
            found = out.clone(), wide.clone()
            function()
        assert torch.equal(found[0], out)
        assert torch.equal(found[1], wide)


def test_tapes_of_many_sizes_share_their_memory() -> None:
    arena, buffer = Arena(), torch.randn(64, 64)
    weight = torch.randn(64, 64)

    def call(size: int) -> None:
        x = buffer[:size]
        for _ in range(100):
            x = linear(x, weight)
            x = x / x.norm()
        buffer[:size].copy_(x)

    graphs = [TapeGraph(lambda size=size: call(size), arena) for size in range(64, 0, -1)]
    with torch.inference_mode():
        for graph in graphs:
            graph.replay()
        gc.collect()
        buffer.fill_(1.0)
        graphs[0].replay()
        first = buffer.clone()
        for graph in graphs[1:]:
            graph.replay()
        buffer.fill_(1.0)
        graphs[0].replay()
        assert torch.equal(buffer, first)


def test_an_arena_holds_little_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.device.tape.BLOCK_BYTES", 1 << 16)
    arena = Arena()
    for size in range(1, 1001):  # each larger than every tensor before, as logits of more rows are
        held = [arena.empty((size, 1000), torch.float32) for _ in range(2)]
        del held
    assert arena.num_bytes < 4 * 2 * 1000 * 1000 * 4  # all that it ever made


@pytest.mark.parametrize("inference", [True, False])
def test_what_reads_a_value_is_not_recorded(inference: bool) -> None:
    x, first = torch.ones(3), torch.tensor(0)
    reads: tuple[Callable[[], object], ...] = (
        x.tolist,
        x.sum().item,
        x.numpy,
        lambda: float(x[0]),
        lambda: bool(x[0] > 0),
        lambda: x[first],  # becomes a view at a number
        lambda: torch.full((3,), first),
        lambda: x[x > 0],
        lambda: torch.equal(x, x),
        lambda: torch.is_nonzero(first),
        lambda: np.asarray(x),
        lambda: np.from_dlpack(x),
    )
    with torch.inference_mode(inference):
        for read in reads:
            with pytest.raises(RuntimeError, match="reads a value while a tape is recorded"):
                TapeGraph(read, Arena()).replay()
        TapeGraph(lambda: x[torch.tensor([0, 2])], Arena()).replay()  # known without its values
        assert linear(torch.ones(1, 2), torch.ones(2, 2)).tolist() == [[2.0, 2.0]]  # it has ended


def test_a_constant_is_kept() -> None:
    out, weight = torch.zeros(1, 64), torch.eye(64)
    graph = TapeGraph(lambda: out.copy_(linear(torch.tensor([[3.0] * 64]), weight)), Arena())
    for _ in range(3):
        out.zero_()
        graph.replay()
        taken = [torch.full((1, 64), 7.0) for _ in range(50)]  # the memory that is free by now
        assert out.unique().tolist() == [3.0]
    assert len(taken) == 50


def test_what_a_copy_reads_is_kept() -> None:
    """Also where PyTorch does not tell that it was made."""
    out = torch.zeros(64)
    graph = TapeGraph(lambda: out.copy_(torch.from_numpy(np.full(64, 3.0, np.float32))), Arena())
    for _ in range(3):
        out.zero_()
        graph.replay()
        taken = [np.full(64, 7.0, np.float32) for _ in range(200)]  # the memory that is free by now
        assert out.unique().tolist() == [3.0]
    assert len(taken) == 200


def test_a_tape_within_another_is_a_part_of_it() -> None:
    arena, x, weight = Arena(), torch.ones(2, 64), torch.eye(64)
    middle, out = torch.zeros(2, 64), torch.zeros(2, 64)
    inner = TapeGraph(lambda: middle.copy_(linear(x, weight) + 1), arena)

    def call() -> None:
        inner.replay()
        out.copy_(linear(middle, weight) * 2)

    outer = TapeGraph(call, arena)
    with torch.inference_mode():
        for value in range(3):
            x.fill_(value)
            outer.replay()
            assert out.unique().tolist() == [2 * (value + 1)]


def test_a_failed_recording_is_not_kept() -> None:
    x, out, fails = torch.ones(2, 64), torch.zeros(2, 64), [True]
    weight = torch.eye(64)

    @by_call
    def check(y: torch.Tensor) -> None:
        if fails:
            fails.clear()
            raise ValueError("the first call fails")

    def call() -> None:
        y = linear(x, weight)
        check(y)
        out.copy_(y + 1)

    graph = TapeGraph(call, Arena())
    with torch.inference_mode():
        with pytest.raises(ValueError, match="the first call fails"):
            graph.replay()
        assert not out.any()  # nothing is recorded any more: reading is allowed
        for value in range(3):
            x.fill_(value)
            graph.replay()
            assert out.unique().tolist() == [value + 1]


def test_pieces_may_end_in_another_thread() -> None:
    arena, ending = Arena(), SimpleQueue[torch.Tensor | None]()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = Thread(target=lambda: [None for _ in iter(ending.get, None)], daemon=True)
    thread.start()
    kept: list[torch.Tensor] = []
    for i in range(4000):
        kept.append(arena.empty((16 * (1 + i * 7 % 39),), torch.float32))
        if len(kept) > 60:
            for _ in range(i * 5 % 40):
                ending.put(kept.pop(i % len(kept)))
        if i % 50 == 0:
            spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in kept)
            assert all(one[1] <= then[0] for one, then in pairwise(spans))
    ending.put(None)
    thread.join()
    sys.setswitchinterval(interval)


def test_freed_pieces_join_again() -> None:
    arena = Arena()
    pieces = [arena.empty((1000,), torch.float32) for _ in range(9)]
    starts = {piece.data_ptr() for piece in pieces}
    assert len(starts) == 9
    views = [pieces[3][:10]]
    del pieces[3], pieces[::2]
    gc.collect()
    assert arena.empty((1000,), torch.float32).data_ptr() != views[0].data_ptr()
    views.clear()
    pieces.clear()
    gc.collect()
    whole = arena.empty((9000,), torch.float32)
    assert whole.data_ptr() == min(starts)
