"""Random traces: a driver that tortures the scheduler over the hash-chain executor."""

from collections import deque
from collections.abc import Mapping
from random import Random

import numpy as np

from minisgl.config import EngineConfig
from minisgl.core.batch import PENDING, Batch
from minisgl.core.costmodel import CostModel, DevicePeaks, ModelSizes
from minisgl.core.draft_policy import DraftPolicy
from minisgl.core.executor import GrammarMasks, Limits
from minisgl.core.grammar import Forced
from minisgl.core.ngram import NGramProposer
from minisgl.core.policy import Fairness
from minisgl.core.request import Delta, Request, SamplingParams
from minisgl.core.scheduler import Scheduler
from minisgl.core.sequence import Sequence
from minisgl.core.speculation import Speculation, propose_on_device
from tests.world.books import check_books
from tests.world.hash_executor import (
    EOS,
    HashExecutor,
    allowed_at,
    next_token,
    reference,
    run_model,
)

VOCAB = 23
TINY_MODEL = ModelSizes(
    layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocab=VOCAB
)


class Fickle(Speculation):
    """Drafts in some steps and not in others, and lets the draft model follow prompts or not."""

    def __init__(self, random: Random, *args, **options) -> None:
        super().__init__(*args, **options)
        self.random, self.steady = random, random.choice([0.5, 0.9, 1.0])

    def begin(self, num_sequences: int, prefills: bool) -> bool:
        super().begin(num_sequences, prefills)
        self.follows = self.random.random() < self.steady
        return self.random.random() < self.steady


def make_speculation(random: Random, chunk_size: int, forms: Mapping[int, int]) -> Speculation:
    kind = random.choice(["oracle", "ngram", "device", "device", "adaptive"])
    count = random.randrange(1, 5)
    if kind == "oracle":
        return Speculation(make_drafter(random, random.random(), forms), count)
    if kind == "ngram":
        return Speculation(NGramProposer(1, random.randrange(1, 4)), count)
    device = {"on_device": True, "chunk_size": chunk_size}
    if kind == "device":
        return Fickle(random, propose_on_device, count, **device)
    return Speculation(propose_on_device, count, policy=DraftPolicy(count), **device)


def make_drafter(random: Random, share_right: float, forms: Mapping[int, int]):
    """Proposes up to three tokens, right ones or not, pending tokens or not."""

    def drafter(sequence: Sequence, most: int) -> list[int]:
        if random.random() < 0.3:
            return []
        request, held = sequence.request, sequence.token_ids(0, sequence.num_tokens)
        drafts: list[int] = []
        # What is pending is unknown here; the oracle may know it, a real drafter's device does.
        for _ in range(sequence.num_pending + random.randrange(1, 4)):
            kv = run_model(held + drafts, request.cache_salt)
            form, text = forms.get(sequence.uid), held + drafts
            allowed = None if form is None else allowed_at(form, len(text), VOCAB)
            right = next_token(kv, request.params, sequence.choice, text, VOCAB, allowed)
            first_draft = len(drafts) == sequence.num_pending
            wrong = first_draft or len(drafts) > sequence.num_pending
            wrong = wrong and random.random() >= share_right
            drafts.append(random.randrange(VOCAB) if wrong else right)
        return drafts[sequence.num_pending :][:most]

    return drafter


def make_request(random: Random, index: int, bases: list[list[int]], limits: Limits) -> Request:
    """A small prompt over a tiny alphabet, often sharing a prefix with others."""
    base = random.choice(bases)
    prompt = base[: random.randrange(len(base) + 1)]
    prompt = prompt + [random.randrange(1, 3) for _ in range(random.randrange(1, 6))]
    capacity = min(limits.max_context, limits.num_pages * limits.page_size)
    prompt = prompt[: max(capacity - 1, 1)]
    most = capacity - len(prompt) + 1
    max_tokens = random.randrange(1, min(most, random.choice([6, 24])) + 1)
    params = SamplingParams(
        max_tokens=None if random.random() < 0.05 and most < 60 else max_tokens,
        min_tokens=random.randrange(max_tokens + 1) if random.random() < 0.2 else 0,
        ignore_eos=random.random() < 0.2,
        stop_token_ids=(random.randrange(VOCAB),) if random.random() < 0.2 else (),
        n=random.randrange(2, 4) if random.random() < 0.15 else 1,
        logprobs=1 if random.random() < 0.2 else None,
        prompt_logprobs=1 if random.random() < 0.1 else None,
        presence_penalty=1.0 if random.random() < 0.15 else 0.0,
    )
    salt = random.choice(["", "", "", "a"])
    return Request(f"r{index}", prompt, params, random.randrange(3), salt)


class Trial:
    """One random trace: a scheduler, an executor, and what users have been told so far."""

    def __init__(self, random: Random) -> None:
        self.random = random
        page_size = random.choice([1, 2, 3, 4, 16])
        num_pages = random.randrange(12, 48) // page_size + 2
        context = random.choice([12, 40, 200])
        self.limits = Limits(num_pages, page_size, random.randrange(2, 6), context, VOCAB)
        self.depth = random.choice([0, 1, 1])
        target = random.choice([None, None, 0.01, 5.0])
        batch_policy = random.choice(["balanced", "prefill-first", "decode-first"])
        unshared = random.random() < 0.1  # then neither matches nor groups can be asked for
        config = EngineConfig(
            chunked_prefill_size=random.choice([1, 3, 7, 24]),
            schedule_policy=random.choice(["fcfs", "priority"] + ["lpm"] * (not unshared)),
            batch_policy=batch_policy,
            itl_target_ms=target if batch_policy == "balanced" else None,
            disable_radix_cache=unshared,
            cascade_min_shared_tokens=None if unshared else random.choice([None, 1, 1, 9]),
        )
        self.chunk_size = config.chunked_prefill_size
        fairness = Fairness(max_passed=random.choice([1, 64]), headroom=page_size)
        cost_model = None
        if target is not None or random.random() < 0.2:
            cost_model = CostModel(TINY_MODEL, DevicePeaks(1e6, 1e6, 1e-3))
        self.forms: dict[int, int] = {}  # by uid
        speculation = None
        if random.random() < 0.4:
            speculation = make_speculation(random, config.chunked_prefill_size, self.forms)
        self.time = 0.0
        self.scheduler = Scheduler(
            self.limits, config, (EOS,), cost_model, lambda: self.time, speculation, fairness
        )
        self.salts: dict[int, str] = {}
        self.executor = HashExecutor(self.limits, random, self.salts, random.random(), self.forms)
        self.requests: dict[str, Request] = {}
        self.choices: list[tuple[Request, int]] = []  # by uid
        self.share_formed = random.choice([0.0, 0.5, 1.0])
        self.said: dict[tuple[str, int], list[int]] = {}
        self.scored: dict[tuple[str, int], list[int]] = {}  # prompt tokens
        self.ends: dict[tuple[str, int], str] = {}
        self.in_flight: deque[Batch] = deque()
        self.bases = [
            [random.randrange(1, 3) for _ in range(random.randrange(1, 20))] for _ in "ab"
        ]

    def run(self, num_requests: int) -> None:
        random, scheduler = self.random, self.scheduler
        steps = 0
        while len(self.requests) < num_requests or scheduler.has_work:
            steps += 1
            assert steps < 1500, "no end in sight"
            self.time += random.random()
            while len(self.requests) < num_requests and random.random() < 0.5:
                self.add(make_request(random, len(self.requests), self.bases, self.limits))
            if self.requests and random.random() < 0.06:
                self.abort()
            self.step()
        self.check_end()

    def add(self, request: Request) -> None:
        is_formed = self.random.random() < self.share_formed
        for choice in range(request.params.n):
            if is_formed:
                self.forms[len(self.salts)] = self.random.randrange(1000)
            self.choices.append((request, choice))
            self.salts[len(self.salts)] = request.cache_salt
            self.said[request.id, choice] = []
            self.scored[request.id, choice] = []
        self.requests[request.id] = request
        self.scheduler.add(request)

    def abort(self) -> None:
        request = self.requests[self.random.choice(list(self.requests))]
        choice = self.random.choice([None, *range(request.params.n)])
        deltas = self.scheduler.abort(request.id, choice)
        chosen = range(request.params.n) if choice is None else [choice]
        open_ones = {c for c in chosen if (request.id, c) not in self.ends}
        assert {d.choice for d in deltas} == open_ones, "abort ends what is open, and only that"
        self.hear(deltas)
        check_books(self.scheduler)

    def step(self) -> None:
        """One turn of the engine's loop: plan, dispatch, collect what is due, update."""
        if not self.in_flight:
            self.force({uid: [] for uid in self.forms})
        batch = self.scheduler.plan()
        if batch is not None:
            fed = batch.chunks[batch.num_decode :]  # the memory plan relies on their size
            assert sum(chunk.length - 1 for chunk in fed) <= self.chunk_size
            self.executor.dispatch(batch)
            if any(chunk.samples and chunk.uid in self.forms for chunk in batch.chunks):
                self.sample_masked(batch)
            else:
                self.executor.sample(batch.step)
            self.in_flight.append(batch)
        elif not self.in_flight:
            assert not self.scheduler.has_work, "work, but nothing planned and nothing in flight"
        self.collect(self.depth if batch is not None else 0)
        check_books(self.scheduler)

    def collect(self, down_to: int) -> None:
        if len(self.in_flight) > down_to:
            self.hear(self.scheduler.update(self.in_flight.popleft(), self.executor.collect()))

    def sample_masked(self, batch: Batch) -> None:
        """Masks for what every draft may be, and for what follows the last; all else is read."""
        self.collect(0)
        formed = [(i, c) for i, c in enumerate(batch.chunks) if c.samples and c.uid in self.forms]
        asks = any(PENDING in chunk.drafts for _, chunk in formed)
        proposed = self.executor.drafts(batch.step) if asks else [c.drafts for c in batch.chunks]
        indices, bits = [], []
        for index, chunk in formed:
            for place in range(1 + len(proposed[index])):
                indices.append(index)
                allowed = allowed_at(self.forms[chunk.uid], self.length(chunk.uid) + place, VOCAB)
                bits.append([sum(1 << token for token in allowed)])
        self.executor.sample(batch.step, GrammarMasks(indices, np.array(bits, np.uint32)))
        self.force({chunk.uid: proposed[index] for index, chunk in formed})

    def length(self, uid: int) -> int:
        request, choice = self.choices[uid]
        return len(request.prompt_token_ids) + len(self.said[request.id, choice])

    def force(self, drafts: dict[int, list[int]]) -> None:
        """Have tokens appended that forms leave no choice about, often not all of them."""
        runs = {}
        for uid, known in drafts.items():
            run, most = list[int](), self.random.randrange(9)
            while len(run) < most:
                allowed = allowed_at(self.forms[uid], self.length(uid) + len(run), VOCAB)
                if len(allowed) > 1:
                    break
                run += allowed
            if run:
                runs[uid] = Forced(run, known)
        self.hear(self.scheduler.force(runs))

    def hear(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            key = delta.request_id, delta.choice
            params = self.requests[delta.request_id].params
            assert key not in self.ends, "news after the end"
            self.said[key] += delta.token_ids
            prompt_scored = delta.prompt_logprobs
            assert delta.token_ids or prompt_scored or delta.finish_reason in ("abort", "error")
            if params.logprobs is not None and delta.token_ids:
                assert [lp.token_id for lp in delta.logprobs] == delta.token_ids
            if params.prompt_logprobs is None:
                assert prompt_scored is None
            else:  # in order, and all before the first token
                scored = self.scored[key]
                scored += [lp.token_id for lp in prompt_scored or ()]
                prompt = self.requests[delta.request_id].prompt_token_ids
                assert scored == prompt[1 : 1 + len(scored)]
                assert not prompt_scored or not delta.token_ids
                assert not delta.token_ids or len(scored) == len(prompt) - 1
            if delta.finish_reason is not None:
                self.ends[key] = delta.finish_reason
                stopped = delta.finish_reason == "stop"
                assert delta.stop_token_id == (delta.token_ids[-1] if stopped else None)
                assert (delta.error is not None) == (delta.finish_reason == "error")

    def check_end(self) -> None:
        for uid, (request, choice) in enumerate(self.choices):
            request_id, said = request.id, self.said[request.id, choice]
            expected, reason = reference(request, choice, self.limits, self.forms.get(uid))
            ended = self.ends[request_id, choice]
            if ended in ("abort", "error"):
                assert said == expected[: len(said)], (request_id, choice, said, expected)
            else:
                assert (said, ended) == (expected, reason), (request_id, choice)
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_free_pages + stats.num_cached_pages == self.limits.num_pages
        assert stats.num_idle_pages == stats.num_cached_pages


def run_trial(seed: int, num_requests: int = 5) -> Trial:
    trial = Trial(Random(seed))
    trial.run(num_requests)
    return trial
