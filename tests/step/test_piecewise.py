"""Mixed steps in captured pieces: the same tokens as eagerly, and only attention between them."""

from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch
from minisgl.core.executor import GrammarMasks
from minisgl.core.speculation import Speculation
from minisgl.device.cpu import CallPieces, CpuDevice
from minisgl.kernels.activation import silu_and_mul
from minisgl.kernels.embedding import embedding
from minisgl.kernels.linear import linear
from minisgl.kernels.op import forced
from minisgl.kernels.qkv_prepare import qkv_prepare
from minisgl.kernels.rmsnorm import rmsnorm
from minisgl.models.decoder import ROPE_SLACK
from minisgl.start.facts import graph_sizes
from minisgl.start.footprint import pieces_bytes
from minisgl.start.startup import capture_pieces
from minisgl.step.sizes import GraphSizes, piece_sizes
from minisgl.trace import record_with
from tests.world.configs import VOCAB
from tests.world.requests import mixed_requests, shared_requests
from tests.world.tiny import TinyExecutor, guesses, serve

MOST = 40  # tokens of a step in pieces


@pytest.fixture
def executors(executors):
    return partial(executors, most_in_pieces=MOST)


def poison(executor: TinyExecutor) -> list[tuple[int, int]]:
    """Before each pass NaN wherever it does not write first. The (sequences, tokens) of passes."""
    pieces, passes = executor.worker.runner.pieces, []
    forward = pieces.forward

    def poisoned(inputs):
        tokens = len(inputs.input_ids)
        scratch = pieces.scratch
        for tensor in scratch:
            tensor.fill_(torch.nan)
        for tensor in pieces.tokens(pieces.sizes[-1]):
            tensor[tokens:].fill_(-7)  # no token, no position
        hidden = forward(inputs)
        assert hidden.isfinite().all()
        assert all(tensor[tokens:].isnan().all() for tensor in scratch)
        passes.append((len(inputs.rows), tokens))
        return hidden

    pieces.forward = poisoned
    return passes


def mask_all(batch: Batch) -> GrammarMasks:
    index = next(i for i, chunk in enumerate(batch.chunks) if chunk.samples)
    return GrammarMasks([index], np.full((1, -(-VOCAB // 32)), 2**32 - 1, np.uint32))


CASES = {
    "chunks": ({}, {"config": EngineConfig(chunked_prefill_size=20)}),
    "whole": ({"most_in_pieces": 300}, {"arrive": 4}),
    "page1": ({"page_size": 1, "num_pages": 640}, {}),
    "tight": ({"num_pages": 12}, {"overlap": False}),
    "masks": ({}, {"masks": mask_all}),
    "few-graphs": ({"graph_max_sequences": 3}, {"arrive": 4}),
    "drafts": (
        {"graph_widths": (1, 4), "num_pages": 60},
        {"speculation": Speculation(guesses, 3)},
    ),
    "cascade": (
        {"num_pages": 60},
        {"config": EngineConfig(cascade_min_shared_tokens=1), "arrive": 4},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_tokens_as_eagerly(executors, name):
    facts, how = CASES[name]
    requests = shared_requests(8, seed=1) + mixed_requests(11, seed=5)[3:]
    in_pieces = executors(**facts)
    passes = poison(in_pieces)
    found = serve(in_pieces, requests, **how)
    eager = executors(**facts | {"graphs": False, "most_in_pieces": 0})
    assert found.tokens == serve(eager, requests, **how).tokens

    sizes = in_pieces.worker.geometry.piece_sizes
    assert {tokens for _, tokens in passes} <= set(sizes)
    assert len({tokens for _, tokens in passes}) > 1
    mixed = [b for b in found.batches if 0 < b.num_decode < len(b.chunks)]
    assert any(sum(chunk.length for chunk in batch.chunks) <= sizes[-1] for batch in mixed)
    if name == "cascade":
        assert any(batch.cascade_groups for batch in mixed)
    if name == "drafts":
        assert any(chunk.drafts for batch in mixed for chunk in batch.chunks)


def test_a_step_beyond_the_largest_size_runs_eagerly(executors):
    executor = executors(most_in_pieces=10)
    passes = poison(executor)
    found = serve(executor, mixed_requests(9, seed=3))
    assert 0 < len(passes) < len(found.batches)
    assert max(tokens for _, tokens in passes) == 16
    assert max(sum(chunk.length for chunk in batch.chunks) for batch in found.batches) > 16
    plain = serve(executors(most_in_pieces=0), mixed_requests(9, seed=3))
    assert found.tokens == plain.tokens


@contextmanager
def logged(executor: TinyExecutor, monkeypatch):
    """The ops of every pass in pieces, by the parts of it: piece, attention, piece and so on."""
    passes: list[list[list[str]]] = []

    @contextmanager
    def note(name):
        if passes and not name.startswith("layer"):
            passes[-1][-1].append(name)
        yield

    def replay(pieces, *args):
        passes.append([[]])

        def cut(call):
            passes[-1].append([])
            call(*args)
            passes[-1].append([])

        pieces.function(cut)
        parts.append(passes.pop())

    parts: list[list[list[str]]] = []
    monkeypatch.setattr(CallPieces, "replay", replay)
    executor.worker.device.run(record_with, note)
    yield parts
    executor.worker.device.run(record_with, None)


def test_between_two_pieces_there_is_attention_and_nothing_else(executors, monkeypatch):
    executor, grouping = executors(most_in_pieces=200), EngineConfig(cascade_min_shared_tokens=1)
    with logged(executor, monkeypatch) as passes:
        found = serve(executor, shared_requests(5, seed=2), config=grouping, arrive=2)
    attends = ["rmsnorm", "linear", "qkv_prepare"]
    rest = ["linear", "rmsnorm", "linear", "silu_and_mul", "linear"]
    between = []
    for parts in passes:
        assert parts[0::2] == [["embedding", *attends], [*rest, *attends], [*rest, "rmsnorm"]]
        assert parts[1] == parts[3]
        between.append(tuple(parts[1]))
    kinds = {("attention",), ("decode", "attention"), ("cascade", "attention")}
    assert set(between) == kinds
    assert len(between) < len(found.batches)


class Tape(TorchDispatchMode):
    """Takes down a piece's operations on tensors: what a captured graph knows of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[list[tuple]] = [[]]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.pieces[-1].append((function, args, kwargs or {}, result))
        return result


class Taped:
    """Replays a capture's operations on its tensors, and calls what was cut out between."""

    def __init__(self, function) -> None:
        function(lambda call: None)
        self.tape, self.calls = Tape(), []

        def cut(call):
            self.calls.append(call)
            self.tape.pieces.append([])

        with self.tape:
            function(cut)

    def replay(self, *args):
        now: dict[int, torch.Tensor] = {}  # what is made anew, by what was made when capturing

        def current(value):
            return now.get(id(value), value)

        for piece, call in zip_longest(self.tape.pieces, self.calls):
            for function, given, named, made in piece:
                result = function(*tree_map(current, given), **tree_map(current, named))
                now |= {
                    id(a): b for a, b in zip(tree_leaves(made), tree_leaves(result), strict=True)
                }
            if call is not None:
                call(*args)


@contextmanager
def by_references(executor: TinyExecutor):
    """Ops that are native code otherwise, which is not taken down, by what specifies them."""
    ops = (embedding, linear, rmsnorm, silu_and_mul, qkv_prepare)
    within, device = ExitStack(), executor.worker.device
    device.run(within.enter_context, forced(dict.fromkeys((op.name for op in ops), "reference")))
    yield executor.worker
    device.run(within.close)


def test_what_was_captured_at_a_start_serves_every_step(executors):
    """Nothing of a pass but its operations on tensors is left when its pieces are replayed."""
    requests = shared_requests(5, seed=4) + mixed_requests(9, seed=9)[3:]
    executor = executors(most_in_pieces=0)
    with by_references(executor):
        eager = serve(executor, requests).tokens
    executor, taped = executors(), []

    def capture(function):
        taped.append(Taped(function))
        return taped[-1]

    with by_references(executor) as worker:
        worker.device.capture_pieces = capture
        sizes = worker.geometry.piece_sizes
        for size in sizes[::-1]:
            worker.device.run(capture_pieces, worker, size)
        assert [len(one.calls) for one in taped] == [2] * len(sizes)
        assert all(len(piece) > 5 for one in taped for piece in one.tape.pieces)
        assert serve(executor, requests).tokens == eager
    assert len(taped) == len(sizes)


def test_pieces_know_a_steps_tokens_alone_and_nothing_moves(model, executors):
    places = set()

    def watched(inputs):
        if inputs.attend is None:  # a pass that is not in pieces
            return model.forward(inputs)
        sequences = (inputs.rows, inputs.seq_lens, inputs.cu_seqlens_q[1:])
        assert not any(map(len, sequences))
        assert inputs.num_decode == 0
        assert inputs.groups is None
        assert inputs.shared is None
        hidden = model.forward(inputs)
        static = (inputs.input_ids, inputs.positions, inputs.slot_mapping, inputs.page_table)
        places.add(tuple(tensor.data_ptr() for tensor in (*static, *pieces.scratch[:2])))
        return hidden

    executor = executors(SimpleNamespace(forward=watched, logits=model.logits))
    pieces = executor.worker.runner.pieces
    serve(executor, mixed_requests(9, seed=6))
    assert len(places) == 1
    assert len(pieces.captured) > 1


def test_they_are_captured_before_serving_the_largest_first(executors):
    """As a start on a GPU does; the padding row is left as it was."""
    executor = executors()
    worker = executor.worker
    sizes = worker.geometry.piece_sizes
    for size in sizes[::-1]:
        worker.device.run(capture_pieces, worker, size)
    assert worker.runner.pieces.captured == (40, 32, 24, 16, 8)
    requests = mixed_requests(9, seed=7)
    assert serve(executor, requests).tokens == serve(executors(), requests).tokens


@pytest.mark.parametrize("most", [1, 8, 9, 100, 129, 2049, 9000])
def test_sizes_are_near_each_other(most):
    sizes = np.array([0, *piece_sizes(most)])
    assert sizes[-2] < most <= sizes[-1]
    assert (sizes % 8 == 0).all()
    gaps = np.diff(sizes)
    assert (gaps <= np.maximum(8, sizes[:-1] / 8)).all()
    assert gaps.max() <= ROPE_SLACK  # of padding, the last position is one less


def sizes_on_gpu(config: EngineConfig) -> GraphSizes:
    class Gpu(CpuDevice):
        captures = True

    device = Gpu(num_threads=1)
    device.close()
    return graph_sizes(config, torch.bfloat16, device)


def test_no_more_are_captured_than_a_step_can_have():
    facts = {"chunked_prefill_size": 50, "max_running_requests": 5}
    asked = EngineConfig(piecewise_cuda_graph_max_tokens=10_000, **facts)
    assert sizes_on_gpu(asked).pieces[-1] == 56
    drafting = {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": 3}
    asked = EngineConfig(piecewise_cuda_graph_max_tokens=10_000, **facts, **drafting)
    assert sizes_on_gpu(asked).pieces[-1] == 72
    assert sizes_on_gpu(EngineConfig()).pieces == ()


def test_what_they_hold_is_planned(executors, model):
    executor = executors(most_in_pieces=90)
    serve(executor, mixed_requests(3, seed=1))
    pieces = executor.worker.runner.pieces
    held = sum(tensor.nbytes for tensor in pieces.scratch)
    sizes = sizes_on_gpu(EngineConfig(piecewise_cuda_graph_max_tokens=90))
    planned = pieces_bytes(sizes, model.config, torch.float32, 1)
    assert held < planned
    assert pieces_bytes(sizes, model.config, torch.float32, 2) < planned
    none = sizes_on_gpu(EngineConfig())
    assert pieces_bytes(none, model.config, torch.float32, 1) == 0
