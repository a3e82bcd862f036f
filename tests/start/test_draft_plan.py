"""What the memory plan counts for the draft model, beside a count of the tensors that there are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minisgl.build import BUNDLED_MODEL
from minisgl.config import EngineConfig
from minisgl.core.executor import Limits
from minisgl.device import CpuDevice
from minisgl.device.tape import TapeGraph
from minisgl.layers.weights import Placement
from minisgl.libraries import PRODUCT_BYTES, PRODUCTS_KEPT
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.loader import load_model
from minisgl.parallel import Communicator
from minisgl.start import load
from minisgl.start.facts import read_facts
from minisgl.start.footprint import (
    NODE_BYTES,
    NODES_PER_LAYER,
    OTHER_NODES,
    Footprint,
    attention_bytes,
    draft_graph_bytes,
    draft_workspace_bytes,
    workspace_bytes,
)
from minisgl.start.memory_plan import MemoryPlan, plan_memory
from minisgl.step.draft import FIRST_WIDTH, Draft, DraftRunner
from minisgl.step.kv_pool import KVShape
from minisgl.step.rows import RowBuffers
from minisgl.step.sizes import draft_sizes
from tests.start.live import most_live
from tests.world.configs import LLAMA

DRAFTING = {"speculative_algorithm": "draft", "speculative_draft_model": "tiny-draft"}
ROWS, DRAFTS, VOCAB, LAYERS = 24, 3, 131, 2
LIMITS = Limits(num_pages=80, page_size=16, max_rows=ROWS, max_context=64, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def model() -> Decoder:
    facts = ModelConfig.from_dict(LLAMA)
    device = torch.device("cpu")
    return load_model(facts, None, Placement(torch.bfloat16, device))


@pytest.fixture
def draft(model: Decoder) -> Draft:
    facts = model.config
    shape = KVShape(facts.num_layers, facts.num_kv_heads, facts.head_dim, torch.bfloat16)
    return Draft(model, shape, DRAFTS)


class Counting(CpuDevice):
    """Notes the graphs that are made on it."""

    def __init__(self) -> None:
        super().__init__(num_threads=1)
        self.functions: list[Callable[[], object]] = []

    def capture(self, function: Callable[[], object]) -> TapeGraph:
        self.functions.append(function)
        return super().capture(function)


def test_graphs_of_the_draft_model_are_planned(draft: Draft) -> None:
    device, sizes = Counting(), draft_sizes(ROWS, any_size=False)
    assert sizes == (1, 2, 4, 8, 16, 24)

    def count() -> tuple[int, int]:
        """Graphs, and the most bytes alive in one."""
        rows = RowBuffers(device, ROWS, 8, VOCAB)
        DraftRunner(device, draft, LIMITS, rows, Communicator(), sizes, graphs=True).capture()
        return len(device.functions), max(map(most_live, device.functions))

    try:
        graphs, most = device.run(count)
    finally:
        device.close()
    nodes = LAYERS * NODES_PER_LAYER + OTHER_NODES
    activations = draft_graph_bytes(draft, sizes) - graphs * nodes * NODE_BYTES
    assert most > 24 * FIRST_WIDTH * 32 * 2  # hidden states at the least
    assert most <= activations <= 3 * most  # native operators' own temporaries are not seen
    other = Draft(None, None, DRAFTS)  # of a rank that has none
    assert draft_graph_bytes(other, sizes) == 0
    assert draft_workspace_bytes(other, 100) == 0


def test_the_draft_models_share_reaches_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Footprint] = []

    def plan(free: int, needs: Footprint, *args: Any, **others: Any) -> MemoryPlan:
        planned.append(needs)
        return plan_memory(free, needs, *args, **others)

    monkeypatch.setattr(load, "plan_memory", plan)
    common = {
        "dtype": "float32",
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
    layouts = 4 * 5 * (1 + 2) + 4 * 6 * 2  # of passes of one token and of two
    assert within.buffers - without.buffers == 4 * 5 * (1 + 2 * DRAFTS) + 8 + layouts
    assert within.weights > without.weights
    assert within.workspace == without.workspace  # the bundled draft model is smaller
    facts = ModelConfig.from_hf(BUNDLED_MODEL)
    most = 64 + 5 * (1 + DRAFTS)  # tokens: prompts', and every row's with its drafts
    activations = workspace_bytes(facts, most, torch.float32, 1) + PRODUCTS_KEPT * PRODUCT_BYTES
    assert without.workspace == activations + attention_bytes(facts, 256, torch.float32, 1)
