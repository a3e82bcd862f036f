"""What the memory plan counts for the draft model, beside a count of the tensors that there are."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisgl.build import BUNDLED_MODEL
from minisgl.config import EngineConfig
from minisgl.core.executor import Limits
from minisgl.device import CpuDevice, Memory
from minisgl.device.cpu import CallGraph
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.loader import load_model
from minisgl.parallel import Solo
from minisgl.start import load
from minisgl.start.facts import read_facts
from minisgl.start.footprint import (
    NODE_BYTES,
    NODES_PER_LAYER,
    OTHER_NODES,
    Footprint,
    draft_graph_bytes,
    draft_workspace_bytes,
    workspace_bytes,
)
from minisgl.start.memory_plan import MemoryPlan, plan_memory
from minisgl.step.draft import FIRST_WIDTH, Draft, DraftRunner
from minisgl.step.kv_pool import KVShape
from minisgl.step.rows import RowBuffers
from minisgl.step.sizes import draft_sizes
from tests.world.configs import LLAMA

DRAFTING = {"speculative_algorithm": "draft", "speculative_draft_model": "tiny-draft"}
ROWS, DRAFTS, VOCAB, LAYERS = 24, 3, 131, 2
LIMITS = Limits(num_pages=80, page_size=16, max_rows=ROWS, max_context=64, vocab_size=VOCAB)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make and somebody holds."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known = set[int]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known | given:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
                self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def most_live(call: Callable[[], object]) -> int:
    with Live() as live:
        call()
    return live.most


@pytest.fixture(scope="module")
def model() -> Decoder:
    facts = ModelConfig.from_dict(LLAMA)
    device = torch.device("cpu")
    return load_model(facts, "", dtype=torch.bfloat16, device=device, load_format="dummy", seed=0)


@pytest.fixture
def draft(model: Decoder) -> Draft:
    facts = model.config
    shape = KVShape(facts.num_layers, facts.num_kv_heads, facts.head_dim, torch.bfloat16)
    return Draft(model, shape, DRAFTS)


class Counting(CpuDevice):
    """Notes the sizes of the buffers and the graphs that are made on it."""

    def __init__(self) -> None:
        super().__init__(num_threads=1)
        self.buffers: list[int] = []
        self.graphs: list[CallGraph] = []

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        made = super().zeros(shape, dtype)
        self.buffers.append(made.nbytes)
        return made

    def capture(self, function: Callable[[], object]) -> CallGraph:
        self.graphs.append(super().capture(function))
        return self.graphs[-1]


def test_graphs_of_the_draft_model_are_planned(draft: Draft) -> None:
    device, sizes = Counting(), draft_sizes(ROWS, any_size=False)
    assert sizes == (1, 2, 4, 8, 16, 24)

    def count() -> tuple[int, int, int]:
        """Bytes of the buffers, graphs, most bytes alive in one."""
        rows = RowBuffers.allocate(device, ROWS, 8, VOCAB)
        device.buffers.clear()
        others = LIMITS, rows, Solo(), sizes
        DraftRunner(device, Draft(None, None, DRAFTS), *others, graphs=True)  # without a pool
        buffers = sum(device.buffers)
        DraftRunner(device, draft, *others, graphs=True).capture()
        most = max(most_live(graph.replay) for graph in device.graphs)
        return buffers, len(device.graphs), most

    try:
        buffers, graphs, most = device.run(count)
    finally:
        device.close()
    assert draft_graph_bytes(draft, sizes, captures=False) == buffers
    nodes = LAYERS * NODES_PER_LAYER + OTHER_NODES
    activations = (
        draft_graph_bytes(draft, sizes, captures=True) - buffers - graphs * nodes * NODE_BYTES
    )
    assert most > 24 * FIRST_WIDTH * 32 * 2  # hidden states at the least
    assert most <= activations <= 3 * most  # native operators' own temporaries are not seen
    other = Draft(None, None, DRAFTS)  # of a rank that has none
    assert draft_graph_bytes(other, sizes, captures=True) == buffers
    assert draft_workspace_bytes(other, 100) == 0


def test_the_draft_models_share_reaches_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Footprint] = []

    def plan(memory: Memory, needs: Footprint, *args: Any, **others: Any) -> MemoryPlan:
        planned.append(needs)
        return plan_memory(memory, needs, *args, **others)

    monkeypatch.setattr(load, "plan_memory", plan)
    common = {
        "max_total_tokens": 256,
        "max_running_requests": 5,
        "speculative_num_draft_tokens": DRAFTS,
    }
    for options in ({"speculative_algorithm": "ngram"}, DRAFTING):
        device = CpuDevice(num_threads=1)
        try:
            config = EngineConfig(**common, **options, chunked_prefill_size=64)  # type: ignore[arg-type]
            load.load_worker(read_facts(config, BUNDLED_MODEL, device), device)
        finally:
            device.close()
    without, within = planned
    assert within.graphs - without.graphs == 4 * 5 * (1 + 2 * DRAFTS) + 8
    assert within.weights > without.weights
    assert within.workspace == without.workspace  # the bundled draft model is smaller
    facts = ModelConfig.from_hf(BUNDLED_MODEL)
    most = 64 + 5 * (1 + DRAFTS)  # tokens: prompts', and every row's with its drafts
    assert without.workspace == workspace_bytes(facts, most, facts.dtype, 1)
