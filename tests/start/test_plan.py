"""The memory plan's arithmetic, the pool it sizes, and the worker that is built from a config."""

import json
import logging
import re
import time
from pathlib import Path

import pytest
import torch
import triton

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, Chunk, RowSetup
from minisgl.core.executor import Limits
from minisgl.core.request import SamplingParams
from minisgl.device import CpuDevice
from minisgl.kernels import warmup
from minisgl.models.config import ModelConfig
from minisgl.parallel import Communicator
from minisgl.start import launches
from minisgl.start.facts import read_facts
from minisgl.start.footprint import (
    MODEST_TOKENS,
    NODE_BYTES,
    NODES_PER_LAYER,
    OTHER_NODES,
    Footprint,
    decode_bytes,
    workspace_bytes,
)
from minisgl.start.launches import Start
from minisgl.start.load import load_worker
from minisgl.start.memory_plan import (
    MODEST_BYTES,
    MemoryPlan,
    check_graphs,
    plan_memory,
)
from minisgl.start.startup import Kernels, Stages
from minisgl.step.executor import LocalExecutor
from minisgl.step.kv_pool import KVPool, KVShape
from minisgl.step.rows import RowBuffers
from minisgl.step.sizes import GraphSizes, padded_sizes
from tests.world.configs import LLAMA

MIB = 2**20
SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=32, dtype=torch.bfloat16)


NEEDS = Footprint(
    weights=100 * MIB, buffers=3 * MIB, workspace=20 * MIB, logits=7 * MIB, graphs=11 * MIB
)


def plan(free: int, *, modest: bool = False, **changes) -> MemoryPlan:
    config = EngineConfig(**{"page_size": 16, "mem_fraction_static": 0.5} | changes)
    return plan_memory(free, NEEDS, SHAPE.bytes_per_token, config, max_context=64, modest=modest)


def test_what_is_left_becomes_pages():
    made = plan(300 * MIB)
    page = 16 * 3 * 2 * 2 * 32 * 2
    left = (300 + 100) * MIB // 2 - 141 * MIB
    assert SHAPE.bytes_per_token * 16 == page
    assert made.num_pages == left // page
    assert made.kv == made.num_pages * page
    assert made.budget - page < NEEDS.total + made.kv <= made.budget
    assert made.num_tokens == made.num_pages * 16
    for amount in ("100.0", "20.0", "7.0", "3.0", "11.0", f"{made.kv / MIB:.1f}"):
        assert f"{amount} MiB" in made.table()


@pytest.mark.parametrize(("stated", "pages"), [(16, 1), (100, 6), (1600, 100)])
def test_a_stated_pool_is_what_is_stated(stated: int, pages: int, caplog: pytest.LogCaptureFixture):
    assert plan(300 * MIB, max_total_tokens=stated).num_pages == pages
    says = "max_total_tokens 100 becomes 96: whole pages of 16 tokens"
    assert (says in caplog.text) == (stated == 100)


def test_the_cpu_default_is_modest():
    made = plan(300_000 * MIB, modest=True)
    assert made.num_tokens == MODEST_TOKENS
    large = KVShape(80, 8, 128, torch.float32).bytes_per_token
    needs, config = Footprint(0, 0, 0, 0, 0), EngineConfig()
    limited = plan_memory(2**40, needs, large, config, max_context=64, modest=True)
    assert MODEST_BYTES - large * config.page_size < limited.kv <= MODEST_BYTES
    assert plan(300_000 * MIB, modest=True, max_total_tokens=10**6).num_tokens == 10**6


@pytest.mark.parametrize(
    ("free", "changes", "message"),
    [
        (
            100 * MIB,
            {},
            "no memory is left for KV: mem_fraction_static 0.5 gives 100 MiB, of which 141",
        ),
        (300 * MIB, {"max_total_tokens": 15}, r"at least page_size \(16\), got 15"),
        (
            300 * MIB,
            {"max_total_tokens": 10**6},
            "max_total_tokens 1000000 needs 732 MiB .* 59 MiB",
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
        RowBuffers(device, 30_000, 2, 151_936)
    device.close()


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, (1,)), (3, (1, 2, 4)), (4, (1, 2, 4)), (20, (1, 2, 4, 8, 16, 24))]
)
def test_graph_sizes_cover_every_batch(most: int, sizes: tuple[int, ...]):
    assert padded_sizes(most) == sizes
    assert padded_sizes(most)[-1] >= most


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_a_worker_follows_its_config(model: Path, caplog):
    config = EngineConfig(
        load_format="dummy", max_running_requests=5, max_total_tokens=200, page_size=16
    )
    with caplog.at_level(logging.INFO, "minisgl"):
        device = CpuDevice(num_threads=1)
        facts = read_facts(config, model, device)
        worker = load_worker(facts, device)
    executor = LocalExecutor(worker)
    try:
        limits = executor.limits
        assert (limits.num_pages, limits.page_size, limits.max_rows) == (12, 16, 5)
        assert (limits.max_context, limits.vocab_size) == (96, 131)
        assert facts.model.eos_token_ids == (3, 7)
        assert worker.dtype == facts.dtype == torch.bfloat16
        assert "memory plan" in caplog.text
        for stage in ("load weights", "plan memory", "warm up", "total"):
            assert re.search(rf"^  {stage} +\d+\.\d\d s$", caplog.text, re.M), stage
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
        config = EngineConfig(load_format="dummy", **changes)
        with pytest.raises(ValueError, match=message):
            load_worker(read_facts(config, model, device), device)
    finally:
        device.close()


def test_dtype_and_context_may_be_chosen(model: Path):
    config = EngineConfig(
        load_format="dummy", dtype="float32", context_length=50, max_total_tokens=64
    )
    device = CpuDevice(num_threads=1)
    try:
        worker = load_worker(read_facts(config, model, device), device)
        assert worker.dtype == torch.float32
        assert worker.limits.max_context == 50
        assert worker.geometry.token_multiple == 8
    finally:
        device.close()


def test_graphs_are_planned_by_what_they_hold():
    """Twice the graphs take more, and the parts are what they are said to be."""
    facts = ModelConfig.from_dict(LLAMA)
    few, many = (GraphSizes.of(most, (1,), False, 1) for most in (8, 256))
    assert many.by_width[1][-1] == many.max_tokens == many.max_sequences == 256
    most, least = (decode_bytes(s, facts, torch.bfloat16, 1, False, True) for s in (many, few))
    grown = most - least
    more = len(many.by_width[1]) - len(few.by_width[1])
    hidden = 2 * 32 * (sum(many.by_width[1]) - sum(few.by_width[1]))
    logits = 2 * 4 * 131 * (256 - 8)
    workspace = workspace_bytes(facts, 256, torch.bfloat16, 1)
    workspace -= workspace_bytes(facts, 8, torch.bfloat16, 1)
    nodes = facts.num_layers * NODES_PER_LAYER + OTHER_NODES
    assert grown == hidden + logits + workspace + more * nodes * NODE_BYTES
    assert GraphSizes.of(8, (1, 5), False, 1).max_tokens == 40


@pytest.mark.parametrize(("taken", "level"), [(10 * MIB, "INFO"), (12 * MIB, "WARNING")])
def test_what_graphs_took_is_compared_with_the_plan(caplog, taken: int, level: str):
    with caplog.at_level(logging.INFO, "minisgl"):
        check_graphs(plan(300 * MIB), taken)
    last = caplog.records[-1]
    assert last.levelname == level
    assert f"{taken // MIB}" in last.getMessage()
    assert "11" in last.getMessage()


def test_stages_of_a_start_are_timed_and_shown():
    stages = Stages()
    for seconds in (0.01, 0.02):
        with stages.stage("wait"):
            time.sleep(seconds)
    with stages.stage("load"), stages.stage("inner"):
        pass
    assert list(stages.seconds) == ["wait", "inner", "load"]
    assert stages.seconds["wait"] >= 0.03
    lines = stages.table().splitlines()
    assert [line.split()[0] for line in lines] == ["start-up:", "wait", "inner", "load", "total"]
    with pytest.raises(KeyError), stages.stage("fails"):
        raise KeyError
    assert "fails" in stages.seconds


def test_one_rank_compiles_and_all_load_what_is_on_disk(model: Path, monkeypatch):
    """In this order: nobody looks for a kernel that is still being compiled."""
    log: list[str] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def compile_ahead(start: Start, processes: int | None = None) -> tuple[int, list[str]]:
        log.append("compile" if processes is None else f"list with {processes} processes")
        assert (start.arch, start.limits, start.path) == (90, limits, str(model))
        return 3, [f"kernels of rank {start.rank}"]

    monkeypatch.setattr(launches, "compile_ahead", compile_ahead)
    monkeypatch.setattr(warmup, "load", log.extend)

    class Gpu(CpuDevice):
        torch_device = torch.device("cuda")

        def zeros(self, shape, dtype):
            return torch.zeros(shape, dtype=dtype)

    class Second(Communicator):
        def broadcast(self, x):
            log.append("wait")
            return x

    def compiled() -> None:
        triton.knobs.compilation.listener(
            src=type("Source", (), {"name": "k"}), metadata={}, metadata_group={}, times=None,
            cache_hit=False,
        )  # fmt: skip

    limits = Limits(8, 16, 4, 96, 131)
    facts = read_facts(EngineConfig(max_running_requests=4), model, CpuDevice(num_threads=1))
    for rank, first in ((0, "compile"), (1, "list with 0 processes")):
        device = Gpu(num_threads=1)
        kernels = Kernels(device)
        kernels.build(facts, limits, Second(rank=rank, size=2))
        device.close()
        assert log == [first, "wait", f"kernels of rank {rank}"]
        log.clear()
        compiled()
        kernels.ready()
        compiled()
        assert kernels.missed() == 1
    cpu = CpuDevice(num_threads=1)
    kernels = Kernels(cpu)
    kernels.build(facts, limits, Communicator())
    assert (kernels.missed(), log) == (0, [])
    cpu.close()
