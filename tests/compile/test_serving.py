"""Serving launches nothing that warm-up has not compiled.

A real executor serves real batches while the CPU's tensors go to the GPU's launchers, which compile
for sm_90 and stop. What they would have computed is zero.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch
from minisgl.core.executor import GrammarMasks
from minisgl.core.speculation import Speculation, propose_on_device
from minisgl.kernels.config import table_for
from minisgl.kernels.launches import Launch
from minisgl.kernels.offline import OfflineDriver, offline
from minisgl.kernels.op import forced
from minisgl.kernels.shapes import EngineShapes
from minisgl.kernels.warmup import CompileCounter, serving_launches
from minisgl.start.draft import draft_launches
from minisgl.start.kernel_shapes import model_shapes
from minisgl.step.executor import LocalExecutor
from minisgl.step.fixed_order import FixedOrder
from minisgl.step.kv_pool import KVShape
from tests.kernels.cards import all_ops
from tests.world.configs import VOCAB
from tests.world.requests import mixed_requests, shared_requests
from tests.world.tiny import make_executor, serve, tiny_decoder

ARCH = 90
DRAFTS = 2  # of a sequence in a step, at most


PORTABLE = {
    op.name: "portable" for op in all_ops() for i in op.implementations if i.name == "portable"
}


def on_gpu_launchers() -> ExitStack:
    """Every op by its portable kernel, compiled and not run; fresh memory is zero."""
    stack = ExitStack()
    stack.enter_context(offline(ARCH))
    stack.enter_context(forced(PORTABLE))

    def zeroed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).zero_()

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        stack.enter_context(patch.object(owner, name, zeroed(getattr(owner, name))))
    return stack


NEW_DEVICE = itertools.count(1000)


@pytest.fixture
def counter(monkeypatch):
    """On a device of the test's own: this process has compiled nothing for it."""
    device = next(NEW_DEVICE)
    monkeypatch.setattr(OfflineDriver, "get_current_device", lambda self: device)
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    made = CompileCounter()
    made.install()
    return made


def engine_shapes(executor: LocalExecutor, fixed: bool) -> EngineShapes:
    """Those of an engine over it, with drafts and without cascade groups."""
    limits = executor.limits
    return EngineShapes(
        limits.page_size,
        limits.num_pages,
        executor.worker.geometry.page_table_width,
        limits.max_rows,
        max_drafts=DRAFTS,
        batch_invariant=fixed,
    )


def warm_up(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


@pytest.mark.parametrize("facts", [{"graphs": False}, {}, {"most_in_pieces": 100}], ids=str)
@pytest.mark.parametrize("fixed", [False, True])
def test_warm_up_has_compiled_whatever_a_step_launches(counter, facts, fixed):
    decoder = tiny_decoder(torch.bfloat16)
    model = FixedOrder(decoder, torch.device("cpu")) if fixed else decoder
    executor = make_executor(
        model, dtype=torch.bfloat16, graph_widths=(1, 1 + DRAFTS), num_pages=60, **facts
    )
    worker, engine = executor.worker, replace(engine_shapes(executor, fixed), cascade=not fixed)
    launches = list(serving_launches(model_shapes(decoder), engine, table_for(ARCH)))

    def masks(batch: Batch) -> GrammarMasks:
        sampling = [i for i, chunk in enumerate(batch.chunks) if chunk.samples]
        rows = [i for i in sampling for _ in range(1 + len(batch.chunks[i].drafts))]
        return GrammarMasks(rows, np.full((len(rows), -(-VOCAB // 32)), 2**32 - 1, np.uint32))

    contexts = worker.device.run(on_gpu_launchers)
    if fixed:
        model._choices = PORTABLE | {"linear": "persistent"}
    try:
        worker.device.run(warm_up, launches)
        before = counter.total
        guess = Speculation(lambda sequence, most: [0] * min(most, sequence.uid % 3), DRAFTS)
        requests = mixed_requests(7, seed=1, max_tokens=5)
        drafted = serve(executor, requests, speculation=guess)
        serve(executor, requests[:3], masks=masks)
        grouping = None if fixed else EngineConfig(cascade_min_shared_tokens=1)
        grouped = serve(executor, shared_requests(5, seed=2), config=grouping, arrive=4)
        assert counter.names[before:] == []
        assert any(chunk.drafts for batch in drafted.batches for chunk in batch.chunks)
        assert any(batch.cascade_groups for batch in grouped.batches) != fixed
    finally:
        worker.device.run(contexts.close)
        worker.close()


@pytest.mark.parametrize("fixed", [False, True])
def test_warm_up_has_compiled_whatever_a_draft_model_launches(counter, fixed):
    """Of another shape than the target, whose kernels are no help."""
    target = tiny_decoder(torch.bfloat16)
    draft = tiny_decoder(torch.bfloat16, seed=1, hidden_size=48, num_key_value_heads=1)
    model = FixedOrder(target, torch.device("cpu")) if fixed else target
    executor = make_executor(
        model,
        dtype=torch.bfloat16,
        graph_widths=(1, 1 + DRAFTS),
        draft=draft,
        draft_shape=KVShape(2, 1, 16, torch.bfloat16),
        num_drafts=DRAFTS,
    )
    worker, engine, table = executor.worker, engine_shapes(executor, fixed), table_for(ARCH)
    launches = [*serving_launches(model_shapes(target), engine, table)]
    launches += serving_launches(model_shapes(draft), draft_launches(engine), table)
    contexts = worker.device.run(on_gpu_launchers)
    if fixed:
        model._choices = PORTABLE | {"linear": "persistent"}
    try:
        worker.device.run(warm_up, launches)
        before = counter.total
        guess = Speculation(propose_on_device, DRAFTS, on_device=True, chunk_size=24)
        config = EngineConfig(chunked_prefill_size=24)
        requests = mixed_requests(7, seed=1, max_tokens=5)
        drafted = serve(executor, requests, speculation=guess, config=config)
        assert counter.names[before:] == []
        assert any(batch.draft_chunks for batch in drafted.batches)
        assert any(chunk.drafts for batch in drafted.batches for chunk in batch.chunks)
    finally:
        worker.device.run(contexts.close)
        worker.close()
