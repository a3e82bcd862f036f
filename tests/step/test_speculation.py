"""Drafts of a draft model on the device: the target's own text, whatever they are and whenever.

The target as its own draft model proposes what it would sample itself, so that every draft must be
accepted: one slot of its KV that is missing or stale, one penalty or position that differs, and
some are not.
"""

import re
from random import Random

import numpy as np
import pytest
import torch

from minisgl.config import EngineConfig
from minisgl.core.batch import PENDING, Batch, Chunk, RowSetup
from minisgl.core.ngram import NGramProposer
from minisgl.core.request import Request, SamplingParams
from minisgl.core.scheduler import Scheduler
from minisgl.core.speculation import Speculation, propose_on_device
from minisgl.device import CpuDevice
from minisgl.engine.engine import Engine
from minisgl.engine.messages import EngineInfo
from minisgl.kernels.advance import accept_and_advance
from minisgl.kernels.sampling import make_params, sample
from tests.step.regex_grammar import RegexBackend, spell
from tests.world.books import check_books
from tests.world.configs import VOCAB
from tests.world.requests import mixed_requests
from tests.world.tiny import EOS, judge, serve, tiny_decoder
from tests.world.trial import Fickle

SMALL_STEPS = EngineConfig(chunked_prefill_size=24)


@pytest.fixture(scope="module")
def stranger():
    return tiny_decoder(seed=1)


def steady(count: int = 3) -> Speculation:
    return Speculation(
        propose_on_device,
        count,
        on_device=True,
        chunk_size=SMALL_STEPS.chunked_prefill_size,
    )


def rejected(served) -> int:
    """Drafts that the target did not sample."""
    return sum(
        len(chunk.drafts) - (len(tokens) - 1)
        for batch, output in zip(served.batches, served.outputs, strict=True)
        for chunk, tokens in zip(batch.chunks, output.token_ids, strict=True)
        if chunk.drafts
    )


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("facts", [{}, {"page_size": 1, "num_pages": 640}, {"graphs": False}])
def test_a_draft_model_that_is_the_target_is_always_right(model, executors, overlap, facts):
    """Chunked prompts, prefix hits inside a page, penalties, filters, log-probabilities."""
    requests = mixed_requests(14, seed=2)
    plain = serve(executors(**facts), requests, config=SMALL_STEPS)
    executor = executors(draft=model, graph_widths=(1, 2, 4), **facts)
    served = serve(executor, requests, overlap=overlap, config=SMALL_STEPS, speculation=steady())
    assert served.tokens == plain.tokens
    for request in requests:
        for choice in range(request.params.n):
            judge(model, request, choice, served.results[request.id, choice])
    stats = served.scheduler.stats()
    assert stats.num_accepted_drafts > 50
    assert rejected(served) == 0
    assert len(served.batches) < len(plain.batches)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_capture_that_runs_what_it_captures_leaves_nothing_behind(
    model, executors, monkeypatch, count
):
    """As on a GPU: warmed up with draft graphs that are not there yet, then all captured."""
    requests = mixed_requests(8, seed=6)
    plain = serve(executors(), requests)
    capture = CpuDevice.capture

    def run_and_capture(device, function):
        function()
        return capture(device, function)

    with monkeypatch.context() as patch:
        patch.setattr(CpuDevice, "capture", run_and_capture)
        executor = executors(draft=model, num_drafts=count, graph_widths=(1, 1 + count))
        worker = executor.worker
        worker.device.run(worker.runner.draft.capture)
        for graphs in worker.runner.graphs.values():
            worker.device.run(graphs.capture)
    served = serve(executor, requests, speculation=steady(count))
    assert served.tokens == plain.tokens
    assert served.scheduler.stats().num_accepted_drafts > 20
    assert rejected(served) == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stranger_as_draft_model_changes_nothing(executors, stranger, overlap):
    requests = mixed_requests(14, seed=4)
    plain = serve(executors(), requests)
    served = serve(executors(draft=stranger), requests, overlap=overlap, speculation=steady())
    assert served.tokens == plain.tokens
    stats = served.scheduler.stats()
    assert stats.num_drafts > 5 * stats.num_accepted_drafts


@pytest.mark.parametrize("seed", range(4))
def test_holes_are_caught_up(model, executors, seed):
    """Drafting in some steps only, prompts followed or not, pages shared, preempted, reused."""
    random = Random(seed)
    speculation = Fickle(random, propose_on_device, 3, on_device=True, chunk_size=24)
    speculation.steady = 0.6
    facts = {"num_pages": 10 + 5 * seed}
    requests = mixed_requests(10, seed=seed, max_tokens=30)
    plain = serve(executors(**facts), requests, arrive=5)
    served = serve(
        executors(draft=model, **facts),
        requests,
        overlap=bool(seed % 2),
        speculation=speculation,
        config=SMALL_STEPS,
        arrive=5,
    )
    assert served.tokens == plain.tokens
    stats = served.scheduler.stats()
    assert any(batch.draft_chunks for batch in served.batches)
    assert any(not chunk.drafts for b in served.batches for chunk in b.chunks[: b.num_decode])
    assert stats.num_accepted_drafts > 30
    assert rejected(served) == 0
    if seed == 0:
        assert stats.num_preemptions > 0


def test_ends_inside_a_draft(model, executors):
    """EOS and stop ids that are drafted end the text there; max_tokens is exact."""
    requests = [
        Request("eos", [4, 5], SamplingParams(max_tokens=20, seed=1, logit_bias={EOS[0]: 3.0})),
        Request("late", [4, 6], SamplingParams(max_tokens=20, min_tokens=6, logit_bias={1: 100.0})),
        Request("stop", [4, 7], SamplingParams(max_tokens=20, stop_token_ids=tuple(range(2, 20)))),
        *(Request(f"{n}", [9], SamplingParams(max_tokens=n, ignore_eos=True)) for n in range(1, 8)),
    ]
    plain = serve(executors(), requests)
    served = serve(executors(draft=model), requests, speculation=steady())
    assert served.tokens == plain.tokens
    assert served.tokens["late", 0].index(EOS[0]) == 6
    assert [len(served.tokens[str(n), 0]) for n in range(1, 8)] == list(range(1, 8))
    for key, result in served.results.items():
        assert result.finish_reason == plain.results[key].finish_reason


def test_an_abort_while_drafts_are_in_flight(model, executors):
    executor = executors(draft=model)
    scheduler = Scheduler(executor.limits, eos_token_ids=EOS, speculation=steady())
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
    for name in "ab":
        scheduler.add(Request(name, [3, 4, ord(name) - 90], params))
    said: dict[str, list[int]] = {"a": [], "b": []}
    flying, steps = [], 0
    while scheduler.has_work:
        batch = scheduler.plan()
        if batch is not None:
            executor.dispatch(batch)
            executor.sample(batch.step)
            flying.append(batch)
        steps += 1
        if steps == 4:
            scheduler.abort("b")
            check_books(scheduler)
        if len(flying) > (batch is not None):
            for delta in scheduler.update(flying.pop(0), executor.collect()):
                said[delta.request_id] += delta.token_ids
        check_books(scheduler)
    alone = serve(executors(), [Request("a", [3, 4, 7], params)]).tokens["a", 0]
    assert said["a"] == alone
    assert len(said["b"]) < 40


# ---- grammars along the drafts ----------------------------------------------------------------


def engine_of(executor, speculation, overlap: bool) -> Engine:
    info = EngineInfo("m", "/", "Qwen3ForCausalLM", "float32", "cpu", list(EOS), executor.limits)
    scheduler = Scheduler(executor.limits, SMALL_STEPS, EOS, speculation=speculation)
    return Engine(scheduler, executor, info, overlap=overlap, grammar_backend=RegexBackend(EOS[0]))


def answers(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    said: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            said.setdefault((delta.request_id, delta.choice), []).extend(delta.token_ids)
    return said


EXPRESSIONS = ["a(b|c)*d", "(ab)*(cd)*e", "a*", "x(yz|zy)*x|w*v"]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_grammars_hold_along_the_drafts(model, executors, overlap, kind):
    """The same text with drafts and without, some of it free; drafts are accepted under masks."""
    requests = [
        Request(
            f"r{i}",
            [3 + i, 4, 5],
            SamplingParams(
                max_tokens=40,
                seed=i,
                n=1 + i % 2,
                structured_outputs={"regex": EXPRESSIONS[i]} if i < len(EXPRESSIONS) else None,
            ),
        )
        for i in range(6)
    ]
    plain = answers(engine_of(executors(), None, overlap), requests)
    speculation = steady() if kind == "draft" else Speculation(NGramProposer(1, 3), 3)
    engine = engine_of(executors(draft=model if kind == "draft" else None), speculation, overlap)
    assert answers(engine, requests) == plain
    for (name, _), tokens in plain.items():
        index = int(name[1:])
        if index < len(EXPRESSIONS) and tokens[-1] == EOS[0]:
            assert re.fullmatch(EXPRESSIONS[index], spell(tokens, EOS[0]))
    stats = engine.stats().scheduler
    assert stats.num_accepted_drafts > 5
    assert stats.num_drafts > stats.num_accepted_drafts  # the draft model does not see the masks


def test_drafts_are_told_before_the_forward_pass_is_sampled(model, executors):
    executor = executors(draft=model)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    prompt = Chunk(0, 0, 2, 0, 3, [3, 4, 5], 0, [1], True)
    follow = Chunk(0, 0, 2, 0, 3, [3, 4, 5], 0, [], False)
    setup = RowSetup(0, 0, 2, 0, 3, params, [])
    executor.dispatch(Batch(0, [prompt], 0, [setup], draft_chunks=[follow]))
    with pytest.raises(ValueError, match="step 0 has no drafts that the device proposes"):
        executor.drafts(0)
    executor.sample(0)
    executor.collect()
    decode = Chunk(0, 0, 2, 3, 3, [], 0, [], True, [PENDING, PENDING])
    executor.dispatch(Batch(1, [decode], 1))
    (drafts,) = executor.drafts(1)
    executor.sample(1)
    (tokens,) = executor.collect().token_ids
    assert tokens[:2] == drafts
    assert all(0 <= token < VOCAB for token in drafts)
    executor.dispatch(Batch(2, [Chunk(0, 0, 2, 6, 5, [], 0, [], True, [PENDING] * 4)], 1))
    executor.sample(2)
    with pytest.raises(RuntimeError, match="has 4 drafts, but there are at most 3"):
        executor.collect()


# ---- the distribution -------------------------------------------------------------------------


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """Of next tokens [V, V] by the token before, against their probabilities; V (V - 1) degrees."""
    expected = p * counts.sum(1, keepdims=True)
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_distribution_is_the_targets():
    """200,000 tokens of a Markov chain over 7 tokens, drafted by another chain, by the kernels that
    sample, verify and advance. What the draft chain alone would say is far off."""
    vocab, rows, k, random = 7, 4000, 3, np.random.default_rng(0)
    target, draft = random.normal(size=(2, vocab, vocab)).astype(np.float32)
    draft = target + 0.25 * draft
    target_logits, draft_logits = torch.from_numpy(target), torch.from_numpy(draft)
    params = make_params(rows)
    every = torch.arange(rows, dtype=torch.int32)
    last = torch.zeros(rows, dtype=torch.int32)
    lengths = torch.zeros(rows, dtype=torch.int32)
    counts = torch.zeros((rows, vocab), dtype=torch.int32)
    seen, drafted_seen = np.zeros((2, vocab, vocab))
    total = accepted_total = 0
    while total < 200_000:
        before = last.clone()
        fed = [last.clone()]
        for j in range(k):
            at = lengths.long() + 1 + j
            fed.append(sample(draft_logits[fed[-1].long()].clone(), every, at, params))
        np.add.at(drafted_seen, (fed[0].numpy(), fed[1].numpy()), 1)
        drafts = torch.stack(fed[1:], 1)
        inputs = torch.stack(fed, 1).view(-1)
        positions = (lengths[:, None] + 1 + torch.arange(k + 1)).view(-1)
        tokens = sample(
            target_logits[inputs.long()].clone(), every.repeat_interleave(k + 1), positions, params
        )
        first = every * (k + 1)
        accepted = accept_and_advance(
            tokens, first, every, drafts, positions, last, lengths, counts, torch.ones_like(last)
        )
        said = tokens.view(rows, k + 1).numpy()
        taken = np.arange(k + 1) <= accepted.numpy()[:, None]
        context = np.concatenate([before.numpy()[:, None], said[:, :-1]], 1)
        np.add.at(seen, (context[taken], said[taken]), 1)
        total += int(taken.sum())
        accepted_total += int(accepted.sum())
    assert int(counts.sum()) == total
    p = np.exp(target) / np.exp(target).sum(1, keepdims=True)
    degrees = vocab * (vocab - 1)
    limit = degrees + 5 * (2 * degrees) ** 0.5
    assert chi_square(seen, p) < limit
    assert chi_square(drafted_seen, p) > 10 * limit
    assert accepted_total > 0.3 * total
