"""Cascade groups from plan to attention: packed as the op takes them, and the same tokens."""

from unittest.mock import patch

import numpy as np
import pytest
import torch

from minisgl.config import EngineConfig
from minisgl.core.batch import MAX_CASCADE_GROUPS, Batch, CascadeGroup, Chunk
from minisgl.core.speculation import Speculation
from minisgl.device.tape import by_call
from minisgl.kernels.cascade import cascade
from minisgl.layers import attention
from minisgl.step.graphs import Forward
from minisgl.step.inputs import pack_step
from minisgl.step.rows import HostRows
from minisgl.step.sizes import Geometry, cascade_words
from tests.world.configs import VOCAB
from tests.world.requests import shared_requests
from tests.world.tiny import guesses, make_executor, serve, tiny_decoder

GROUPS = EngineConfig(cascade_min_shared_tokens=1)


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


def served(model, requests, config, **facts):
    """What is served, the groups of every call of the op, and the graphs."""
    facts, calls = dict(facts), []

    @by_call
    def spy(q, kv, groups, shared, *, width, out):
        calls.append((groups.tolist(), shared.tolist(), width))
        return cascade(q, kv, groups, shared, width=width, out=out)

    serving = {"overlap": facts.pop("overlap", True)}
    if facts.pop("drafts", False):
        serving["speculation"] = Speculation(guesses, 3)
    executor = make_executor(model, num_pages=facts.pop("num_pages", 60), **facts)
    try:
        with patch.object(attention, "cascade", spy):
            result = serve(executor, requests, config=config, arrive=4, **serving)
    finally:
        graphs = executor.worker.runner.graphs
        executor.close()
    return result, calls, graphs


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"graphs": False},
        {"page_size": 1, "num_pages": 900},
        {"overlap": False, "num_pages": 24},  # preempts
        {"drafts": True, "graph_widths": (1, 4)},
        {"drafts": True, "graphs": False},
    ],
    ids=["graphs", "eager", "page1", "tight", "drafts", "eager-drafts"],
)
def test_same_tokens_with_groups_and_without(model, facts):
    requests = shared_requests(9, seed=1)
    with_groups, calls, graphs = served(model, requests, GROUPS, **facts)
    without, none, _ = served(model, requests, None, **facts)
    assert with_groups.tokens == without.tokens
    assert not none
    assert calls
    named = [batch for batch in with_groups.batches if batch.cascade_groups]
    assert len(calls) == 2 * len(named)  # the layers
    assert {max(chunk.length for chunk in b.chunks[: b.num_decode]) > 1 for b in named} == (
        {True, False} if "drafts" in facts else {False}
    )
    halves = {half for own in graphs.values() for _, half in own.captured}
    assert (Forward.GROUPED in halves) == facts.get("graphs", True)


def test_groups_are_packed_as_the_op_takes_them():
    chunks = [Chunk(i, 0, i, 70 + i, 1, [], 0, [], True) for i in range(5)]
    groups = [CascadeGroup(0, 2, 3), CascadeGroup(2, 2, 1)]
    prompt = Chunk(9, 0, 8, 0, 2, [1, 2], 0, [], False)
    for batch, sizes in (
        (Batch(0, chunks, 5, cascade_groups=groups), {1: (8,)}),
        (Batch(0, [*chunks, prompt], 5, cascade_groups=groups), {}),
    ):
        geometry = Geometry(9, 10, 1, sizes, 10_000, page_size=16)
        step = pack_step(batch, HostRows(10, VOCAB), geometry)
        assert step.replays == bool(sizes)
        packed, shared = np.split(step.sections["cascade"], [cascade_words(1)[0]])
        rows = packed.reshape(MAX_CASCADE_GROUPS, 3).tolist()
        assert rows == [[0, 2, 3], [2, 2, 1], *[[0, 0, 0]] * (MAX_CASCADE_GROUPS - 2)]
        assert shared.tolist() == [48, 48, 16, 16] + [0] * (step.num_decode - 4)
    plain = pack_step(Batch(0, chunks, 5), HostRows(10, VOCAB), geometry)
    assert "cascade" not in plain.sections


def test_captured_halves_share_what_sampling_reads(model, monkeypatch):
    """A second half reads the hidden states in one place, whichever first half wrote them."""
    executor = make_executor(model)
    monkeypatch.setattr(executor.worker.device, "captures", True)
    graphs = executor.worker.runner.graphs[1]
    executor.worker.device.run(lambda: graphs.capture(cascade=True))
    assert {half for _, half in graphs.captured} > set(Forward)
    plain, _ = executor.worker.device.run(lambda: graphs.forward(8, Forward.PLAIN))
    grouped, _ = executor.worker.device.run(lambda: graphs.forward(8, Forward.GROUPED))
    executor.close()
    assert plain.data_ptr() == grouped.data_ptr()
    assert torch.isfinite(grouped).all()
