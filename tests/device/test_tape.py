"""Tapes: replayed, they do what the function does, in memory that they share and give back."""

import gc

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
        assert arena.most_bytes <= 8 * 64 * 64 * 4  # where every size kept all it would be 100 MB
        buffer.fill_(1.0)
        graphs[0].replay()
        first = buffer.clone()
        for graph in graphs[1:]:
            graph.replay()
        buffer.fill_(1.0)
        graphs[0].replay()
        assert torch.equal(buffer, first)


def test_what_reads_a_value_is_not_recorded() -> None:
    x = torch.ones(3)
    for read in (x.tolist, x.sum().item, x.numpy, lambda: float(x[0]), lambda: bool(x[0] > 0)):
        with pytest.raises(RuntimeError, match="reads a value while a tape is recorded"):
            TapeGraph(read, Arena()).replay()
    with torch.inference_mode():
        assert linear(torch.ones(1, 2), torch.ones(2, 2)).tolist() == [[2.0, 2.0]]  # it has ended


def test_freed_pieces_join_again() -> None:
    arena = Arena()
    pieces = [arena.empty_like(torch.empty(1000)) for _ in range(9)]
    starts = {piece.data_ptr() for piece in pieces}
    assert len(starts) == 9
    views = [pieces[3][:10]]
    del pieces[3], pieces[::2]
    gc.collect()
    assert arena.empty_like(torch.empty(1000)).data_ptr() != views[0].data_ptr()
    views.clear()
    pieces.clear()
    gc.collect()
    whole = arena.empty_like(torch.empty(9000))
    assert whole.data_ptr() == min(starts)
