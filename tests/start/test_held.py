"""The memory plan against what a start holds: every tensor that is alive after it is planned."""

import gc
from typing import Any

import pytest
import torch

from minisgl.build import BUNDLED_MODEL
from minisgl.config import EngineConfig
from minisgl.device import CpuDevice
from minisgl.kernels.attention.cpu import attention_cpu
from minisgl.kernels.attention.paged import PagedKV
from minisgl.kernels.logprobs import logprobs
from minisgl.models.config import ModelConfig
from minisgl.start import load
from minisgl.start.facts import read_facts
from minisgl.start.footprint import attention_bytes, logits_bytes
from minisgl.start.memory_plan import MemoryPlan
from minisgl.step.rows import RowBuffers
from tests.start.live import most_live
from tests.world.configs import LLAMA

ROWS = 700  # so that a tensor with an entry for each row is more than SLACK
SLACK = 2048  # bytes: tensors of a few entries, and the hidden states of a step of two tokens
DRAFT = {"speculative_algorithm": "draft", "speculative_draft_model": str(BUNDLED_MODEL)}


def storages() -> dict[int, int]:
    """Bytes of every tensor's memory on the CPU, by its address."""
    gc.collect()
    alive = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
    memory = (x.untyped_storage() for x in alive if x.device.type == "cpu")
    return {each.data_ptr(): each.nbytes() for each in memory}


def start(
    monkeypatch: pytest.MonkeyPatch, captures: bool, **options: Any
) -> tuple[MemoryPlan, int]:
    """The plan of a start, and the bytes that it left in tensors."""
    plans: list[MemoryPlan] = []
    plan_memory = load.plan_memory

    def plan(*args: Any, **others: Any) -> MemoryPlan:
        plans.append(plan_memory(*args, **others))
        return plans[-1]

    monkeypatch.setattr(load, "plan_memory", plan)
    config = EngineConfig(**{"max_running_requests": ROWS, "max_total_tokens": 2048} | options)
    device = CpuDevice(num_threads=1)
    monkeypatch.setattr(device, "captures", captures)
    before = storages()
    try:
        worker = load.load_worker(read_facts(config, BUNDLED_MODEL, device), device)
        held = sum(size for address, size in storages().items() if address not in before)
        assert worker.runner.rows.page_table.nbytes < held
    finally:
        device.close()
    return plans[0], held


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"page_size": 1},
        {"page_size": 64, "batch_invariant": True, "dtype": "float32"},
        {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": 3},
        {**DRAFT, "speculative_num_draft_tokens": 3},
    ],
)
def test_what_is_held_after_a_start_is_what_was_planned(monkeypatch, options):
    plan, held = start(monkeypatch, captures=False, **options)
    planned = plan.needs.weights + plan.needs.buffers + plan.kv
    assert planned <= held <= planned + SLACK


def test_with_graphs_what_they_hold_is_planned_too(monkeypatch):
    options = {"max_running_requests": 20, "piecewise_cuda_graph_max_tokens": 64}
    plan, held = start(monkeypatch, captures=True, chunked_prefill_size=64, **options)
    planned = plan.needs.weights + plan.needs.buffers + plan.kv
    assert planned < held <= planned + plan.needs.graphs


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_page_table_is_in_the_plan(monkeypatch, page_size):
    plan, _ = start(monkeypatch, captures=False, page_size=page_size)
    assert plan.needs.buffers > (ROWS + 1) * 4 * 2048 // page_size  # context 2,048


def test_a_buffer_that_is_not_planned_is_found(monkeypatch):
    """Planted: one int32 for each row, allocated beside the device's `zeros`."""
    allocate, planted = RowBuffers.__init__, []

    def allocate_more(self, *sizes):
        planted.append(torch.zeros(ROWS, dtype=torch.int32))
        allocate(self, *sizes)

    monkeypatch.setattr(RowBuffers, "__init__", allocate_more)
    plan, held = start(monkeypatch, captures=False)
    assert held > plan.needs.weights + plan.needs.buffers + plan.kv + SLACK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_prompts_attention_on_a_cpu_is_planned(dtype):
    model, length = ModelConfig.from_dict(LLAMA), 6000
    pool = torch.randn(2, length + 32, model.num_kv_heads, model.head_dim).to(dtype)
    pages = torch.randperm(length // 16, dtype=torch.int32)[None]  # scattered: they are gathered
    q = torch.randn(300, model.num_heads, model.head_dim).to(dtype)
    at = torch.tensor([0], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    kv = PagedKV(pool[0], pool[1], pages, *at, page_size=16, scale=1.0)
    took = most_live(lambda: attention_cpu(q, kv, torch.tensor([0, 300], dtype=torch.int32)))
    planned = attention_bytes(model, length, dtype, 1)
    assert 0.5 * planned < took <= planned + 4 * q.nbytes  # those are in the plan for all operators


def test_scores_of_a_prompt_are_planned():
    logits = torch.randn(200, 5000)
    took = logits.nbytes + most_live(lambda: logprobs(logits, torch.arange(200), 20))
    assert took <= logits_bytes(5000, 200)


def test_scored_prompts_are_planned_where_there_are_few_rows(monkeypatch):
    options = {"max_running_requests": 2, "chunked_prefill_size": 512}
    plan, _ = start(monkeypatch, captures=False, **options)
    assert plan.needs.logits == logits_bytes(2048, 512)
