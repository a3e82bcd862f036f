"""The memory plan's arithmetic, the pool it sizes, and the worker that is built from a config."""

import json
import logging
from pathlib import Path

import pytest
import torch

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, Chunk, RowSetup
from minisgl.core.request import SamplingParams
from minisgl.device import CpuDevice, Memory
from minisgl.runtime.executor import LocalExecutor
from minisgl.runtime.graphs import padded_sizes
from minisgl.runtime.kv_pool import CPU_BYTES, CPU_TOKENS, KVPool, KVShape, MemoryPlan, plan_memory
from minisgl.runtime.rows import RowBuffers
from minisgl.runtime.worker import load_worker

MIB = 2**20
SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=32, dtype=torch.bfloat16)


def plan(free: int, **changes) -> MemoryPlan:
    facts = {
        "on_cpu": False,
        "weights": 100 * MIB,
        "workspace": 20 * MIB,
        "logits": 7 * MIB,
        "counts": 3 * MIB,
        "page_size": 16,
        "max_context": 64,
        "mem_fraction_static": 0.5,
        "max_total_tokens": None,
    }
    return plan_memory(Memory(free, 2 * free, 0), SHAPE, **(facts | changes))


def test_what_is_left_becomes_pages():
    made = plan(300 * MIB)
    page = 16 * 3 * 2 * 2 * 32 * 2
    left = (300 + 100) * MIB // 2 - 130 * MIB
    assert SHAPE.bytes_per_token * 16 == page
    assert made.num_pages == left // page
    assert made.kv == made.num_pages * page
    total = made.weights + made.workspace + made.logits + made.counts + made.kv
    assert made.budget - page < total <= made.budget
    assert made.num_tokens == made.num_pages * 16
    for amount in ("100.0", "20.0", "7.0", "3.0", f"{made.kv / MIB:.1f}"):
        assert f"{amount} MiB" in made.table()


@pytest.mark.parametrize(("stated", "pages"), [(16, 1), (100, 6), (1600, 100)])
def test_a_stated_pool_is_what_is_stated(stated: int, pages: int):
    assert plan(300 * MIB, max_total_tokens=stated).num_pages == pages


def test_the_cpu_default_is_modest():
    made = plan(300_000 * MIB, on_cpu=True)
    assert made.num_tokens == CPU_TOKENS
    large = KVShape(80, 8, 128, torch.float32)
    facts = {"weights": 0, "workspace": 0, "logits": 0, "counts": 0, "page_size": 16}
    memory = Memory(2**40, 2**41, 0)
    limited = plan_memory(
        memory,
        large,
        on_cpu=True,
        max_context=64,
        mem_fraction_static=0.9,
        max_total_tokens=None,
        **facts,
    )
    assert CPU_BYTES - large.bytes_per_token * 16 < limited.kv <= CPU_BYTES
    assert plan(300_000 * MIB, on_cpu=True, max_total_tokens=10**6).num_tokens == 10**6


@pytest.mark.parametrize(
    ("free", "changes", "message"),
    [
        (
            100 * MIB,
            {},
            "no memory is left for KV: mem_fraction_static 0.5 gives 100 MiB, of which 130",
        ),
        (300 * MIB, {"max_total_tokens": 15}, r"at least page_size \(16\), got 15"),
        (
            300 * MIB,
            {"max_total_tokens": 10**6},
            "max_total_tokens 1000000 needs 732 MiB .* 70 MiB",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(free, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(free, **changes)


def test_a_pool_smaller_than_the_context_is_said(caplog):
    with caplog.at_level(logging.WARNING, "minisgl"):
        plan(300 * MIB, max_total_tokens=32)
    assert "32 tokens, fewer than the context of 64" in caplog.text


def test_the_pool_has_a_view_per_layer_and_copies_heads_of_pages():
    device = CpuDevice(num_threads=1)
    pool = KVPool(device, SHAPE, num_pages=5, page_size=4)
    device.close()
    assert pool.storage.shape == (3, 2, 20, 2, 32)
    for layer, (k, v) in enumerate(pool.layers):
        assert k.data_ptr() == pool.storage[layer, 0].data_ptr()
        assert v.data_ptr() == pool.storage[layer, 1].data_ptr()
    before = torch.randn(pool.storage.shape).bfloat16()
    pool.storage.copy_(before)
    pool.copy(torch.tensor([[0, 3, 3], [0, 4, 1]], dtype=torch.int32))
    want = before.clone()
    want[:, :, 12:15] = before[:, :, 0:3]
    want[:, :, 16:17] = before[:, :, 0:1]
    assert torch.equal(pool.storage, want)


def test_counts_that_overflow_an_index_are_refused():
    device = CpuDevice(num_threads=1)
    with pytest.raises(ValueError, match="got 30000 requests"):
        RowBuffers.allocate(device, 30_000, 2, 151_936)
    device.close()


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, (1,)), (3, (1, 2, 4)), (4, (1, 2, 4)), (20, (1, 2, 4, 8, 16, 24))]
)
def test_graph_sizes_cover_every_batch(most: int, sizes: tuple[int, ...]):
    assert padded_sizes(most) == sizes
    assert padded_sizes(most)[-1] >= most


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": [3, 7],
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_worker_follows_its_config(model: Path, caplog):
    config = EngineConfig(
        load_format="dummy", max_running_requests=5, max_total_tokens=200, page_size=16
    )
    with caplog.at_level(logging.INFO, "minisgl"):
        worker, facts = load_worker(config, model, CpuDevice(num_threads=1))
    executor = LocalExecutor(worker)
    try:
        limits = executor.limits
        assert (limits.num_pages, limits.page_size, limits.max_rows) == (12, 16, 5)
        assert (limits.max_context, limits.vocab_size) == (96, 131)
        assert facts.eos_token_ids == (3, 7)
        assert executor.dtype == torch.bfloat16
        assert "memory plan" in caplog.text
        assert "12 pages of 16 tokens" in caplog.text
        setup = RowSetup(0, 0, 0, 0, 2, SamplingParams(temperature=0.0), [])
        executor.dispatch(Batch(0, [Chunk(0, 0, 0, 0, 2, [5, 6], 0, [0], True)], 0, [setup]))
        executor.sample(0)
        ((token,),) = executor.collect().token_ids
        assert 0 <= token < 131
    finally:
        executor.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 97}, "context_length must be at most the model's 96, got 97"),
        ({"max_total_tokens": 10**9}, "max_total_tokens 1000000000 needs"),
    ],
)
def test_what_the_model_cannot_do_is_refused(model: Path, changes, message: str):
    device = CpuDevice(num_threads=1)
    try:
        with pytest.raises(ValueError, match=message):
            load_worker(EngineConfig(load_format="dummy", **changes), model, device)
    finally:
        device.close()


def test_dtype_and_context_may_be_chosen(model: Path):
    config = EngineConfig(
        load_format="dummy", dtype="float32", context_length=50, max_total_tokens=64
    )
    device = CpuDevice(num_threads=1)
    try:
        worker, _ = load_worker(config, model, device)
        assert worker.dtype == torch.float32
        assert worker.limits.max_context == 50
        assert worker.geometry.token_multiple == 8
    finally:
        device.close()
