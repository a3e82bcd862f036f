"""Decode graphs in two halves: which exist, which a step takes, and that nothing they use moves."""

import logging
from collections import defaultdict
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minisgl import csrc
from minisgl.core.batch import Batch
from minisgl.core.executor import GrammarMasks, Limits
from minisgl.core.request import Request, SamplingParams
from minisgl.core.speculation import Speculation
from minisgl.device import CpuDevice
from minisgl.kernels.sampling import column
from minisgl.layers.attention import ForwardInputs
from minisgl.models.decoder import Decoder
from minisgl.start.startup import run_largest, warm_up
from minisgl.step.executor import LocalExecutor
from minisgl.step.graphs import DecodeGraphs, Forward
from minisgl.step.inputs import pack_step
from minisgl.step.kv_pool import KVShape
from minisgl.step.runner import Runner, Step
from minisgl.step.sampler import Sampler, Shaping
from minisgl.step.worker import Worker
from tests.world.configs import VOCAB
from tests.world.requests import mixed_requests, shared_requests
from tests.world.tiny import TinyExecutor, guesses, serve, tiny_decoder


def mask_all(batch: Batch) -> GrammarMasks:
    """Every token allowed, for the first chunk that samples."""
    index = next(i for i, chunk in enumerate(batch.chunks) if chunk.samples)
    return GrammarMasks([index], np.full((1, -(-VOCAB // 32)), 2**32 - 1, np.uint32))


def replayed(executor: TinyExecutor) -> set[tuple[int, Forward | Shaping]]:
    return executor.worker.runner.graphs[1].captured


def test_a_captured_engine_serves_as_one_without_graphs(executors):
    """Captured before the first step, the largest size first, as on a GPU."""
    executor, eager = executors(), executors(graphs=False)
    graphs = executor.worker.runner.graphs[1]
    shown = []

    def progress(sizes):
        shown.extend(sizes)
        return sizes

    executor.worker.device.run(graphs.capture, progress)
    assert shown == sorted(graphs.sizes, reverse=True) == [8, 4]
    assert replayed(executor) == {(s, half) for s in (4, 8) for half in (Forward.PLAIN, *Shaping)}
    requests = mixed_requests(14, seed=2)
    assert serve(executor, requests).tokens == serve(eager, requests).tokens


def test_a_step_takes_the_half_it_needs(executors):
    plain = [Request("p", [3, 4, 5], SamplingParams(max_tokens=4, seed=1))]
    params = SamplingParams(max_tokens=4, seed=1, presence_penalty=0.5)
    penalized = [Request("p", [3, 4, 5], params)]
    scored = [Request("p", [3, 4, 5], SamplingParams(max_tokens=4, seed=1, logprobs=1))]
    for requests, masks, halves in (
        (plain, None, {Shaping.PLAIN}),
        (penalized, None, {Shaping.ADJUSTED}),
        (penalized, mask_all, {Shaping.MASKED}),
        (scored, None, set()),  # raw logits are read between: sampled eagerly
    ):
        executor = executors()
        serve(executor, requests, masks=masks)
        assert replayed(executor) == {(4, half) for half in (Forward.PLAIN, *halves)}


def test_a_batch_beyond_the_largest_graph_runs_eagerly(executors):
    requests = mixed_requests(10, seed=4)
    executor = executors(graph_max_sequences=3)
    few = serve(executor, requests, arrive=10)
    assert max(len(batch.chunks) for batch in few.batches if batch.num_decode) > 4
    assert {size for size, _ in replayed(executor)} == {4}
    assert few.tokens == serve(executors(graphs=False), requests, arrive=10).tokens


@pytest.mark.parametrize(("width", "sizes"), [(1, (4, 8)), (2, (2, 4, 8)), (3, (8,)), (4, (1, 2))])
def test_fp32_graphs_have_sizes_that_treat_rows_alike(executors, width, sizes):
    """4 tokens or a multiple of 8, as everywhere on a CPU in fp32."""
    most = 8 if width < 4 else 2
    executor = executors(graph_widths=(width,), graph_max_sequences=most)
    found = executor.worker.geometry.decode_sizes[width]
    assert found == sizes
    assert all(size * width == 4 or size * width % 8 == 0 for size in found)


def test_compilations_are_those_of_the_worker(model):
    compiled = [0]
    worker = Worker(
        CpuDevice(num_threads=1),
        model,
        KVShape(2, 2, 16, torch.float32),
        Limits(4, 16, 2, 32, VOCAB),
    )
    worker.compilations = lambda: compiled[0]
    executor = LocalExecutor(worker)
    assert executor.compilations == 0
    compiled[0] += 2
    assert executor.compilations == 2
    executor.close()


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_warm_up_asks_for_everything_and_leaves_padding_greedy(executors, page_size):
    facts = {"page_size": page_size, "num_pages": 640 // page_size}
    executor = executors(**facts)
    worker = executor.worker
    asked = set()

    class Watched(Runner):
        def forward(self, step):
            asked.update(step.packed.sections)
            super().forward(step)

        def sample(self, step, masks):
            asked.update({"masks"} if masks else ())
            super().sample(step, masks)

    runner = worker.runner
    runner.__class__ = Watched
    for widths in ((1,), (1, 2)):
        assert "drafts" not in asked  # without drafts they are not asked for
        worker.device.run(warm_up, worker, widths, True, True)
    wanted = {"masks", "copies", "drafts", "asked", "targets", "patch_index", "bias_ids"}
    assert wanted | {"count_rows", "setup_rows", "points"} <= asked
    padding = runner.rows.padding
    assert column(runner.rows.params, "temperature")[padding] == 0
    assert runner.rows.counted[padding] == 0
    requests = mixed_requests(7, seed=8)
    assert serve(executor, requests).tokens == serve(executors(**facts), requests).tokens


@pytest.mark.skipif(csrc.load("model_ops", wait=True) is None, reason="no compiler")
def test_a_warm_up_names_what_has_no_native_form(executors, caplog):
    worker = executors().worker  # in fp32, of which no native op takes prompts
    with caplog.at_level(logging.INFO, "minisgl"):
        worker.device.run(warm_up, worker, (1,), False, False)
    (named,) = [text for text in caplog.messages if "no native form" in text]
    called = ["attention.cpu._sequence_by_sequence", "kv_copy.copy_pages_reference"]
    assert named.endswith(": " + ", ".join(f"minisgl.kernels.{name}" for name in called))


@pytest.mark.parametrize(("tokens", "drafts"), [(20, 0), (300, 0), (20, 3)])  # the context is 128
def test_the_largest_step_has_every_row_and_leaves_nothing_behind(executors, tokens, drafts):
    executor = executors()
    worker, sizes = executor.worker, []

    class Watched(Runner):
        def forward(self, step):
            packed = step.packed
            sizes.append((packed.num_tokens, packed.num_points, packed.replays))
            super().forward(step)

    runner = worker.runner
    runner.__class__ = Watched
    worker.device.run(run_largest, worker, tokens, drafts)
    ((most, points, replays),) = sizes
    chunks = -(-tokens // 128)
    decoding = 8 * (1 + drafts)
    assert most == -(-(decoding + tokens) // 8) * 8  # padded, in fp32
    assert (points, replays) == (decoding + chunks, False)
    requests = mixed_requests(7, seed=8)
    assert serve(executor, requests).tokens == serve(executors(), requests).tokens


class Calls(TorchFunctionMode):
    """What PyTorch is called for, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """PyTorch's operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(csrc.load("model_ops", wait=True) is None, reason="nothing is recorded")
@pytest.mark.parametrize("tied", [False, True])
def test_a_replay_is_not_held_up_by_python(executors, tied):
    """A call of PyTorch gives up Python's lock, for which the planner waits when a step has ended:
    there is none before the replay, and none in it."""
    model = tiny_decoder(torch.bfloat16, tie_word_embeddings=tied)
    executor = executors(model, dtype=torch.bfloat16)
    batches = serve(executor, mixed_requests(1, seed=3)).batches
    batch = next(b for b in batches if b.num_decode == 1 and not b.chunks[0].pages)
    worker = executor.worker
    step = Step(pack_step(batch, worker.host_rows, worker.geometry))

    def run() -> tuple[list[str], list[str]]:
        with Calls() as calls:
            worker.runner.begin(step)
        with Operators() as operators:
            worker.runner.forward(step)
        return calls.names, operators.names

    assert worker.device.run(run) == ([], [])


class Places:
    """A model, and where it finds what its decode steps read: by sequences and width."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.logits = model.logits
        self.found: dict[tuple[int, int], set[tuple[int, ...]]] = defaultdict(set)
        self.staged: set[int] = set()  # where rows and what comes with them are uploaded to

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        if inputs.num_decode == len(inputs.rows):
            tensors = [weight.target for weight in self.model.weights()]
            tensors += [x for pair in inputs.kv for x in pair]
            values = [getattr(inputs, field.name) for field in fields(inputs)]
            tensors += [value for value in values if isinstance(value, torch.Tensor)]
            key = len(inputs.rows), inputs.decode_width
            self.found[key].add(tuple(tensor.data_ptr() for tensor in tensors))
            self.staged.add(inputs.rows.untyped_storage().data_ptr())
        return self.model.forward(inputs)


def test_nothing_moves_once_it_is_captured(model, executors, monkeypatch):
    """Neither what a pass reads nor what sampling reads and writes."""
    places, masks, sampled = Places(model), defaultdict(set), defaultdict(set)
    replayed: list[tuple[int, int]] = []
    draw, sample = Sampler.draw, DecodeGraphs.sample

    def watched_draw(sampler, hidden, points, shaping, given, *others):
        if shaping is Shaping.MASKED and replayed:
            masks[replayed[-1]].add((given.indices.data_ptr(), given.bits.data_ptr()))
        return draw(sampler, hidden, points, shaping, given, *others)

    def watched_sample(graphs, step, masks):
        replayed.append((step.num_sequences, graphs.width))
        got = sample(graphs, step, masks)
        sampled[replayed.pop()].add(got.data_ptr())
        return got

    monkeypatch.setattr(Sampler, "draw", watched_draw)
    monkeypatch.setattr(DecodeGraphs, "sample", watched_sample)
    executor = executors(places, graph_widths=(1, 3))
    for graphs in executor.worker.runner.graphs.values():
        executor.worker.device.run(graphs.capture)
    for how in (
        {"arrive": 1},
        {"masks": mask_all},
        {"speculation": Speculation(guesses, 2)},
    ):
        serve(executor, shared_requests(9, seed=6), **how)
    sizes = executor.worker.geometry.decode_sizes
    assert set(places.found) == {(size, width) for width in (1, 3) for size in sizes[width]}
    assert len(places.staged) == 1
    assert {width for _, width in sampled} == {1, 3}
    assert masks
    for found in (places.found, sampled, masks):
        assert all(len(where) == 1 for where in found.values())
