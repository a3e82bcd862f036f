"""Batches through the executor against a direct forward of every sequence on its own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from minisgl import csrc
from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, Chunk, RowSetup
from minisgl.core.executor import GrammarMasks
from minisgl.core.request import Request, SamplingParams
from minisgl.core.speculation import Speculation
from tests.world.configs import VOCAB
from tests.world.requests import mixed_requests
from tests.world.tiny import EOS, full_logits, judge, make_executor, serve

SMALL_STEPS = EngineConfig(chunked_prefill_size=24)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("graphs", [False, True])
def test_every_token_is_the_oracles(model, executors, overlap, page_size, graphs):
    """Chunked prompts, prefix hits inside a page (copies), batches that change at every step."""
    executor = executors(page_size=page_size, num_pages=640 // page_size, graphs=graphs)
    requests = mixed_requests(14, seed=page_size)
    served = serve(executor, requests, overlap=overlap, config=SMALL_STEPS)
    for request in requests:
        for choice in range(request.params.n):
            judge(model, request, choice, served.results[request.id, choice])
    assert any(result.num_cached for result in served.results.values())
    if page_size > 1:
        assert any(batch.copies for batch in served.batches)
    # The time of a step that recorded its graph is none to learn from: others are far shorter.
    recorded = executor.worker.device.num_recordings
    assert bool(recorded) == (graphs and csrc.load("model_ops") is not None)
    assert 0 <= sum(not output.seconds for output in served.outputs) <= recorded
    assert sum(output.seconds > 0 for output in served.outputs) > 10


def test_preempted_sequences_resume_alike(model, executors):
    """A pool that does not hold them all: rows change hands, epochs rise, counts are rebuilt."""
    requests = mixed_requests(10, seed=5, max_tokens=30)
    tight = serve(executors(num_pages=10), requests, arrive=10)
    assert tight.scheduler.stats().num_preemptions > 0
    assert any(setup.epoch for batch in tight.batches for setup in batch.setups)
    for request in requests:
        for choice in range(request.params.n):
            judge(model, request, choice, tight.results[request.id, choice])


def test_a_seeded_request_is_the_same_alone_and_in_any_batch(executors):
    executor = executors()
    requests = mixed_requests(14, seed=9)
    together = serve(executor, requests, arrive=14).tokens
    apart = {}
    for request in requests[::-1]:
        apart |= serve(executor, [request], overlap=False).tokens
    assert apart == together


def test_fp32_is_the_same_to_the_bit_in_any_batch(executors):
    """Steps are padded to sizes whose products treat a row alike whatever others are there."""
    csrc.load("model_ops", wait=True)  # not half of it before the native ops are there
    executor = executors()
    config = EngineConfig(disable_radix_cache=True)
    requests = [
        Request(f"r{i}", [3 + i] * (1 + 5 * i), SamplingParams(max_tokens=9, seed=i, logprobs=3))
        for i in range(7)
    ]
    together = serve(executor, requests, config=config, arrive=3).results
    for request in requests:
        alone = serve(executor, [request], config=config).results[request.id, 0]
        assert alone.logprobs == together[request.id, 0].logprobs


class Drafter:
    """Drafts from a table of known continuations; every other one spoilt."""

    def __init__(self, known: dict[str, list[int]], count: int, spoil: int) -> None:
        self.known, self.count, self.spoil, self.calls = known, count, spoil, 0

    def __call__(self, sequence, most: int) -> list[int]:
        self.calls += 1
        known = self.known[sequence.request.id, sequence.choice]
        done = len(sequence.output)
        drafts = known[done : done + self.calls % (self.count + 1)]
        if self.spoil and self.calls % self.spoil == 0:
            drafts = [(token + 1) % VOCAB for token in drafts]
        return drafts[:most]


@pytest.mark.parametrize("graph_widths", [(1,), (4,), (1, 2, 4)])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("spoil", [0, 1, 5])
def test_drafts_never_change_the_output(executors, overlap, spoil, graph_widths):
    """Penalties, seeds, log-probabilities: verified text equals plain sampling's, token by token.

    Under overlap drafts start from the host's stale view, and are wrong more often than not. Graphs
    have room for more drafts than most sequences have.
    """
    requests = mixed_requests(7, seed=3)
    plain = serve(executors(graphs=False), requests)
    executor = executors(graph_widths=graph_widths)
    drafter = Drafter(plain.tokens, 3, spoil)
    speculation = Speculation(drafter, 3)
    drafted = serve(
        executor, requests, overlap=overlap, speculation=speculation, config=SMALL_STEPS
    )
    assert drafted.tokens == plain.tokens
    for key, result in drafted.results.items():
        ids = [entry.token_id for entry in result.logprobs]
        assert ids == [entry.token_id for entry in plain.results[key].logprobs]
    accepted = sum(
        len(tokens) - 1
        for batch, output in zip(drafted.batches, drafted.outputs, strict=True)
        for chunk, tokens in zip(batch.chunks, output.token_ids, strict=True)
        if chunk.drafts
    )
    assert any(chunk.drafts for batch in drafted.batches for chunk in batch.chunks)
    if spoil != 1 and not overlap:
        assert accepted > 20
        assert len(drafted.batches) < len(plain.batches)


@pytest.mark.parametrize("graphs", [False, True])
def test_grammar_masks_reach_their_chunks(model, executors, graphs):
    """Even ids only for one request, odd ones for another, none banned for a third."""
    allowed = {"even": range(0, VOCAB, 2), "odd": range(1, VOCAB, 2)}
    requests = [
        Request(name, [3, 4, 5 + i], SamplingParams(max_tokens=8, seed=i, ignore_eos=True))
        for i, name in enumerate(["free", "odd", "even"])
    ]
    uids = {uid: request.id for uid, request in enumerate(requests)}

    def masks(batch: Batch) -> GrammarMasks:
        indices, bits = [], []
        for i, chunk in enumerate(batch.chunks):
            if chunk.samples and uids[chunk.uid] in allowed:
                row = np.zeros(64, np.uint8)
                row[list(allowed[uids[chunk.uid]])] = 1
                indices.append(i)
                bits.append(np.packbits(row, bitorder="little").view(np.uint32))
        return GrammarMasks(indices, np.array(bits, np.uint32).reshape(-1, 2))

    results = serve(executors(graphs=graphs), requests, masks=masks).results
    assert all(token % 2 == 1 for token in results["odd", 0].tokens)
    assert all(token % 2 == 0 for token in results["even", 0].tokens)
    judge(model, requests[0], 0, results["free", 0])


@pytest.mark.parametrize("graph_widths", [(1,), (3,), (5,)])
def test_masks_of_a_chunk_with_drafts_go_position_by_position(executors, graph_widths):
    executor = executors(graph_widths=graph_widths)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    setup = RowSetup(0, 0, 2, 0, 3, params, [])
    prompt = Chunk(0, 0, 2, 0, 3, [3, 4, 5], 0, [1], True)
    executor.dispatch(Batch(0, [prompt], 0, [setup]))
    executor.sample(0)
    executor.collect()
    only = [9, 17, 40]  # the one id allowed at each verified position
    drafts = [9, 18]  # the second is refused by its mask
    bits = np.zeros((3, 2), np.uint32)
    for i, token in enumerate(only):
        bits[i, token // 32] = np.uint32(1) << np.uint32(token % 32)
    executor.dispatch(Batch(1, [Chunk(0, 0, 2, 3, 3, [], 0, [], True, drafts)], 1))
    executor.sample(1, GrammarMasks([0, 0, 0], bits))
    assert executor.collect().token_ids == [[9, 17]]


def test_stops_and_bans(model, executors):
    """EOS ends a sequence, and is banned until min_tokens."""
    bias = {EOS[0]: 100.0}
    requests = [
        Request("ends", [4, 5], SamplingParams(max_tokens=9, logit_bias=bias, seed=1)),
        Request("waits", [4, 5], SamplingParams(max_tokens=9, logit_bias=bias, min_tokens=4)),
        Request("ignores", [4, 5], SamplingParams(max_tokens=5, logit_bias=bias, ignore_eos=True)),
    ]
    other = 50  # which the tokenizer alone names
    ends = SamplingParams(max_tokens=9, logit_bias={other: 100.0}, min_tokens=2)
    requests.append(Request("tokenizer", [4, 5], ends, eos_token_id=other))
    runs_on = replace(ends, ignore_eos=True)
    requests.append(Request("runs on", [4, 5], runs_on, eos_token_id=other))
    results = serve(executors(), requests).results
    assert results["ends", 0].tokens == [EOS[0]]
    assert len(results["tokenizer", 0].tokens) == 3
    assert results["tokenizer", 0].tokens.index(other) == 2
    assert results["runs on", 0].tokens == [other] * 9
    waits = results["waits", 0].tokens
    assert len(waits) == 5
    assert waits.index(EOS[0]) == 4
    assert results["ignores", 0].tokens == [EOS[0]] * 5


def test_prompt_logprobs_in_blocks_of_any_size(model, executors, monkeypatch):
    """The whole prompt, over chunks and blocks, without the logits of all of it at once."""
    monkeypatch.setattr("minisgl.step.sampler.BLOCK_BYTES", 7 * VOCAB * 4)
    shapes = []

    def logits(hidden):
        shapes.append(len(hidden))
        return model.logits(hidden)

    executor = executors(SimpleNamespace(forward=model.forward, logits=logits))
    prompt = np.random.default_rng(0).integers(2, VOCAB, 60).tolist()
    request = Request("p", prompt, SamplingParams(max_tokens=2, prompt_logprobs=4, seed=0))
    served = serve(executor, [request], config=EngineConfig(chunked_prefill_size=33))
    judge(model, request, 0, served.results["p", 0])
    assert max(shapes) <= 8


def test_bf16_runs_unpadded():
    executor = make_executor(dtype=torch.bfloat16)
    try:
        assert executor.worker.geometry.token_multiple == 1
        served = serve(executor, mixed_requests(7, seed=1))
        assert all(result.finish_reason for result in served.results.values())
    finally:
        executor.close()


def test_a_failing_step_surfaces_at_collect(model, executors):
    steps = []

    def fail_at_third(inputs):
        steps.append(1)
        if len(steps) == 3:
            raise FloatingPointError("planted in the model")
        return model.forward(inputs)

    failing = SimpleNamespace(forward=fail_at_third, logits=model.logits)
    executor = executors(failing, graphs=False)
    request = Request("r", [3, 4, 5], SamplingParams(max_tokens=9, seed=0))
    with pytest.raises(RuntimeError, match="planted in the model") as caught:
        serve(executor, [request])
    assert isinstance(caught.value.__cause__, FloatingPointError)
    assert len(steps) == 3  # nothing ran after it


def test_a_malformed_batch_surfaces_at_collect(executors):
    executor = executors()
    executor.dispatch(Batch(0, [Chunk(0, 0, 0, 0, 3, [1], 0, [], True)], 0))
    executor.sample(0)
    with pytest.raises(RuntimeError, match="length 3 but 1 token ids"):
        executor.collect()


def test_calls_out_of_order_are_refused(executors):
    executor = executors()
    with pytest.raises(ValueError, match="no sampled step"):
        executor.collect()
    executor.dispatch(Batch(4, [Chunk(0, 0, 0, 0, 1, [1], 0, [0], False)], 0))
    with pytest.raises(ValueError, match="no sampled step"):
        executor.collect()
    with pytest.raises(ValueError, match="step 5 is not the oldest"):
        executor.sample(5)
    executor.sample(4)
    assert executor.collect().token_ids == [[]]


def test_rows_forget_their_last_sequence(model, executors):
    """One row only: penalties, biases and pages of one request must not leak into the next."""
    executor = executors(max_rows=1)
    requests = mixed_requests(14, seed=21)
    served = serve(executor, requests, arrive=14)
    for request in requests:
        for choice in range(request.params.n):
            judge(model, request, choice, served.results[request.id, choice])


def test_the_judge_notices(model):
    """The oracle itself: a wrong token, and a wrong log-probability, are seen."""
    request = Request("r", [3, 4, 5], SamplingParams(temperature=0.0, max_tokens=3))
    logits = full_logits(model, [3, 4, 5])
    best = int(logits[-1].argmax())
    result = type("R", (), {"tokens": [(best + 1) % VOCAB], "logprobs": []})
    with pytest.raises(AssertionError):
        judge(model, request, 0, result)
