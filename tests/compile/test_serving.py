"""Serving launches nothing that was not recorded ahead.

A real scheduler and executor serve on the GPU without memory on which launches are recorded.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch
from minisgl.core.executor import GrammarMasks, Limits
from minisgl.core.speculation import Speculation, propose_on_device
from minisgl.device.meta import MetaDevice
from minisgl.kernels.grouped_linear.blocks import Form
from minisgl.kernels.offline import recorded
from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.start import launches
from minisgl.start.draft import DraftFacts
from minisgl.start.facts import Facts, graph_sizes, uses_cascade
from minisgl.step.executor import LocalExecutor
from minisgl.step.inputs import pack_step
from minisgl.step.runner import Step
from minisgl.step.worker import Worker
from tests.world.configs import VOCAB
from tests.world.requests import mixed_requests, shared_requests
from tests.world.tiny import Served, serve, tiny_decoder

ARCH = 90
DRAFTS = 2  # of a sequence in a step, at most
NGRAM = {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": DRAFTS}
MODEL = {"speculative_algorithm": "draft", "speculative_draft_model": "a draft model"}
MODEL |= {"speculative_num_draft_tokens": DRAFTS}


def start(
    draft: ModelConfig | None = None,
    rank: int = 0,
    form: Form | None = None,
    experts: int = 0,
    **options: Any,
) -> tuple[Worker, set[str]]:
    """A worker for the tiny model, and what serving with it can launch.

    form: of all its matrices but the last layer's, which are of floats. experts: of each layer.
    """
    config = EngineConfig(max_running_requests=8, chunked_prefill_size=64, **options)
    shape: dict[str, Any] = {}
    if form is not None:
        shape = {"hidden_size": 64, "intermediate_size": 96}
    if experts:
        shape |= {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": experts}
        shape |= {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
    model, dtype, device = tiny_decoder(**shape).config, torch.bfloat16, MetaDevice()
    facts = Facts(
        config,
        Path(),
        model,
        dtype,
        model.max_context,
        uses_cascade(config, model),
        graph_sizes(config, dtype, device),
        None if draft is None else DraftFacts(Path(), draft),
    )
    limits = Limits(60, 16, config.max_running_requests, model.max_context, VOCAB)
    blocks = Decoder(model, Placement(dtype, device.torch_device)).blocks()
    held = [tuple(form for _ in block.forms()) for block in blocks]
    held[len(model.layers)] = blocks[len(model.layers)].forms()
    with recorded(ARCH) as found:
        worker = launches.serve(facts, limits, rank, forms=(held, ()))
    return worker, set(found)


def masks(batch: Batch) -> GrammarMasks:
    sampling = [i for i, chunk in enumerate(batch.chunks) if chunk.samples]
    rows = [i for i in sampling for _ in range(1 + len(batch.chunks[i].drafts))]
    return GrammarMasks(rows, np.full((len(rows), -(-VOCAB // 32)), 2**32 - 1, np.uint32))


def serve_all(worker: Worker, *, drafts: bool, groups: bool) -> list[Served]:
    """With drafts, penalties and log-probabilities; with masks; with groups."""
    executor, guess = LocalExecutor(worker), None
    if drafts:
        guess = Speculation(lambda sequence, most: [0] * min(most, sequence.uid % 3), DRAFTS)
    requests = mixed_requests(7, seed=1, max_tokens=5)
    config = EngineConfig(cascade_min_shared_tokens=1) if groups else None
    return [
        serve(executor, requests, speculation=guess),
        serve(executor, requests[:3], masks=masks),
        serve(executor, shared_requests(5, seed=2), config=config, arrive=4),
    ]


OPTIONS = [{"disable_cuda_graph": True}, {}, {"piecewise_cuda_graph_max_tokens": 64}]


@pytest.mark.parametrize("drafts", [{}, NGRAM], ids=["plain", "drafts"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_whatever_a_step_launches_was_recorded(options, fixed, drafts):
    worker, known = start(**options, **drafts, batch_invariant=fixed)
    with recorded(ARCH) as launched:
        drafted, _, grouped = serve_all(worker, drafts=bool(drafts), groups=not fixed)
    assert launched.keys() - known == set()
    assert any(c.drafts for batch in drafted.batches for c in batch.chunks) == bool(drafts)
    assert any(batch.cascade_groups for batch in grouped.batches) != fixed


@pytest.mark.parametrize("fixed", [False, True])
def test_whatever_weights_in_codes_launch_was_recorded(fixed):
    worker, known = start(form=(4, 32, True, True), batch_invariant=fixed)
    with recorded(ARCH) as launched:
        serve_all(worker, drafts=False, groups=not fixed)
    assert launched.keys() - known == set()
    found = {key.split()[0].rpartition(".")[2] for key in launched}
    assert ("few_rows_kernel" in found) != fixed
    assert "tiles_kernel" in found


@pytest.mark.parametrize("fixed", [False, True])
def test_whatever_experts_in_codes_launch_was_recorded(fixed):
    worker, known = start(form=(4, 32, True, True), experts=3, batch_invariant=fixed)
    with recorded(ARCH) as launched:
        serve_all(worker, drafts=False, groups=not fixed)
    assert launched.keys() - known == set()
    found = {variant.name for variant in launched.values()}
    assert found >= {"coded_experts_kernel", "experts_kernel"}  # the last layer's are of floats


@pytest.mark.parametrize("fixed", [False, True])
def test_whatever_a_draft_model_launches_was_recorded(fixed):
    """Of another shape than the target, whose kernels are no help."""
    draft = tiny_decoder(hidden_size=48, num_key_value_heads=1).config
    worker, known = start(draft, **MODEL, batch_invariant=fixed)
    guess = Speculation(propose_on_device, DRAFTS, on_device=True, chunk_size=24)
    config = EngineConfig(chunked_prefill_size=24)
    requests = mixed_requests(7, seed=1, max_tokens=5)
    with recorded(ARCH) as launched:
        drafted = serve(LocalExecutor(worker), requests, speculation=guess, config=config)
    assert launched.keys() - known == set()
    assert any(batch.draft_chunks for batch in drafted.batches)
    assert any(chunk.drafts for batch in drafted.batches for chunk in batch.chunks)


@pytest.mark.parametrize("drafts", [{}, NGRAM], ids=["plain", "drafts"])
def test_whatever_other_ranks_launch_was_recorded(drafts):
    """They replay the batches of rank 0, and never draw."""
    first, known_first = start(tp_size=2, **drafts)
    other, known = start(tp_size=2, rank=1, **drafts)
    with recorded(ARCH):
        served = serve_all(first, drafts=bool(drafts), groups=True)
    batches = [batch for each in served for batch in each.batches]
    with recorded(ARCH) as launched:
        for batch in batches:
            step = Step(pack_step(batch, other.host_rows, other.geometry))
            other.device.run(other.runner.forward, step)
            other.device.run(other.runner.sample, step, None)
    assert launched
    assert launched.keys() - known == set()
    assert known < known_first


def test_what_was_not_recorded_is_seen():
    worker, _ = start(**NGRAM)
    _, known = start()
    with recorded(ARCH) as launched:
        serve_all(worker, drafts=True, groups=True)
    missed = {launched[key].name for key in launched.keys() - known}
    assert missed >= {"advance_kernel", "decode_kernel", "penalize_kernel"}
