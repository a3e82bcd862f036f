"""N-gram proposals, and how many drafts a sequence gets by what steps cost and drafts bring."""

from itertools import pairwise
from random import Random

import pytest

from minisgl.config import EngineConfig
from minisgl.core.batch import PENDING, Batch, Chunk, StepOutput
from minisgl.core.draft_policy import DraftPolicy
from minisgl.core.executor import Limits
from minisgl.core.ngram import NGramProposer
from minisgl.core.request import Request, SamplingParams
from minisgl.core.scheduler import Scheduler
from minisgl.core.sequence import Sequence, make_sequences
from minisgl.core.speculation import Speculation, propose_on_device

LIMITS = Limits(8000, 4, 64, 4000, 1000)


def sequence_of(prompt: list[int], output: tuple[int, ...] = (), limit: int = 4000) -> Sequence:
    request = Request("r", prompt, SamplingParams())
    limits = Limits(8000, 4, 64, limit, 1000)
    (sequence,) = make_sequences(request, limits, frozenset(), 0, 0.0)
    for token in output:
        sequence.accept([token])
    return sequence


# ---- n-grams ----------------------------------------------------------------------------------


def brute_force(tokens: list[int], smallest: int, largest: int, count: int) -> list[int]:
    """The latest earlier occurrence of the longest suffix, searched for from the end."""
    for size in range(min(largest, len(tokens) - 1), smallest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                grown = list(tokens)
                for index in range(end, end + count):
                    grown.append(grown[index])
                return grown[len(tokens) :]
    return []


@pytest.mark.parametrize("smallest", [1, 2])
@pytest.mark.parametrize("alphabet", [2, 5])
def test_the_index_finds_what_a_search_finds(smallest, alphabet):
    random = Random(smallest * 10 + alphabet)
    for _ in range(150):
        prompt = [random.randrange(alphabet) for _ in range(random.randrange(1, 12))]
        sequence, proposer = sequence_of(prompt), NGramProposer(smallest, 4)
        for _ in range(random.randrange(15)):
            for _ in range(random.randrange(1, 4)):
                sequence.accept([random.randrange(alphabet)])
            held = prompt + sequence.output
            assert proposer(sequence, 3) == brute_force(held, smallest, 4, 3)


def test_an_index_made_in_pieces_finds_what_a_search_finds():
    random = Random(0)
    for alphabet in (6, 12, 30):
        prompt = [random.randrange(alphabet) for _ in range(4000 + alphabet)]
        sequence, proposer = sequence_of(prompt, limit=9000), NGramProposer(2, 4)
        for _ in range(5):
            proposer.begin()
            proposer(sequence, 3)
        held, found = list(prompt), 0
        for _ in range(1500):
            token = random.randrange(alphabet)
            sequence.accept([token])
            held.append(token)
            if random.random() < 0.1:
                expected = brute_force(held, 2, 4, 3)
                assert proposer(sequence, 3) == expected
                found += bool(expected)
        assert found > 50


def test_a_plan_indexes_a_bounded_part_of_long_prompts():
    """Eight prompts whose last tokens stood at their beginning: the last that is indexed."""
    proposer = NGramProposer(2, 4)
    sequences = []
    for index in range(8):
        prompt = [1, 2, 3, 4, 5, *range(6, 800), *([index + 900] * 9000), 1, 2, 3]
        sequences.append(sequence_of(prompt, limit=10_000))
    num_plans = 0
    while [proposer(sequence, 2) for sequence in sequences] != [[4, 5]] * 8:
        proposer.begin()
        num_plans += 1
    most = 768 + 512  # tokens indexed in a plan
    assert 8 * 9000 / most <= num_plans <= 8 * 11


def test_a_plan_indexes_a_bounded_part_of_answers_that_grew_without_drafts():
    """Eight of them; a draft proves that the whole answer is known."""
    proposer = NGramProposer(2, 4)
    sequences = [sequence_of([1], limit=10_000) for _ in range(8)]
    proposer.begin()
    assert not any(proposer(sequence, 2) for sequence in sequences)
    for index, sequence in enumerate(sequences):
        sequence.accept([1, 2, 3, 4, 5, *([index + 900] * 3000), 1, 2, 3])
    num_plans = 0
    while [proposer(sequence, 2) for sequence in sequences] != [[4, 5]] * 8:
        proposer.begin()
        num_plans += 1
    most = 768 + 8 * 32  # tokens indexed in a plan
    assert 8 * 3000 / most - 1 <= num_plans <= 40


def test_a_prompt_is_indexed_while_it_is_computed():
    proposer = NGramProposer(2, 4)
    limits = Limits(3000, 4, 4, 12_000, 1000)
    config = EngineConfig(chunked_prefill_size=512)
    scheduler = Scheduler(limits, config, speculation=Speculation(proposer, 2))
    prompt = [1, 2, 3, 4, 5, *([9] * 8000), 1, 2]
    scheduler.add(Request("r", prompt, SamplingParams(max_tokens=9)))
    while (batch := scheduler.plan()).num_decode == 0:
        tokens = [[3] if chunk.samples else [] for chunk in batch.chunks]
        scheduler.update(batch, StepOutput(batch.step, tokens))
    assert batch.chunks[0].drafts == [4, 5]


def test_the_unread_token_is_foreseen():
    sequence = sequence_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    sequence.num_pending = 1  # 3, if all goes well
    proposer = NGramProposer(2, 3)
    assert proposer(sequence, 2) == [4, 5]
    sequence.accept([3])  # read; 4, 5 and one more are in flight
    assert proposer(sequence, 2) == [7, 8]
    sequence.accept([4, 5, 6])
    assert proposer(sequence, 2) == [1, 2]


def test_after_a_wrong_guess_the_drafts_in_flight_are_not_built_upon():
    sequence = sequence_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 7, 8, 1, 2])
    sequence.num_pending = 1
    proposer = NGramProposer(2, 3)
    assert proposer(sequence, 2) == [4, 5]
    sequence.accept([7])  # and not 3: 4 and 5 will be refused
    assert proposer(sequence, 2) == []
    sequence.accept([8])
    assert proposer(sequence, 2) == [2, 7]  # 1 is pending


def test_where_the_text_is_silent_the_cache_may_speak():
    """The same prompt again: its answer lies in the radix tree."""
    proposer = NGramProposer(2, 4)
    scheduler = Scheduler(LIMITS, speculation=Speculation(proposer, 3))
    answer = [11, 12, 13, 14, 15, 16, 17, 18, 19]

    def ask(name: str) -> int:
        scheduler.add(Request(name, [1, 2, 3, 4, 5], SamplingParams(max_tokens=9)))
        steps, said = 0, []
        while scheduler.has_work:
            batch, steps = scheduler.plan(), steps + 1
            (chunk,) = batch.chunks
            right = answer[len(said) : len(said) + len(chunk.drafts) + 1]
            new = right[:1]
            for draft, token in zip(chunk.drafts, right, strict=False):
                if draft != token:
                    break
                new = right[: len(new) + 1]
            (delta,) = scheduler.update(batch, StepOutput(batch.step, [new]))
            said += delta.token_ids
        assert said == answer
        return steps

    assert ask("first") == 9
    assert ask("silent") == 9
    proposer.continuation = scheduler.cache.continuation
    assert ask("again") == 3
    stats = scheduler.stats()
    assert stats.num_accepted_drafts == stats.num_drafts == 6


def test_a_cache_that_says_nothing_is_asked_ever_less():
    proposer, asked = NGramProposer(2, 4), []

    def continuation(sequence: Sequence, path: list[int], count: int) -> list[int]:
        asked.append(sequence.num_tokens)
        return [1] if sequence.num_tokens == 5 else []

    proposer.continuation = continuation
    sequence = sequence_of([0, 1, 2, 3, 4])
    for token in range(5, 405):  # none comes twice
        proposer(sequence, 2)
        sequence.accept([token])
    gaps = [after - before for before, after in pairwise(asked)]
    assert gaps[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert max(gaps) == 64


# ---- how many ---------------------------------------------------------------------------------


class Simulated:
    """Decoding sequences whose drafts are right with `share`, in steps of `seconds(width)`."""

    def __init__(self, share: float, seconds, count: int = 4, *, on_device: bool = False) -> None:
        self.random, self.share, self.seconds = Random(0), share, seconds
        proposer = propose_on_device if on_device else lambda sequence, most: [7] * most
        self.speculation = Speculation(proposer, 4, on_device=on_device, policy=DraftPolicy(4))
        self.scheduler = Scheduler(LIMITS, speculation=self.speculation)
        for index in range(count):
            params = SamplingParams(max_tokens=3500, ignore_eos=True)
            self.scheduler.add(Request(str(index), [index + 1], params))
        self.clock = 0.0
        self.said = 0
        self.widths: list[int] = []

    def run(self, steps: int) -> "Simulated":
        for _ in range(steps):
            batch = self.scheduler.plan()
            new = [self.verify(chunk) for chunk in batch.chunks]
            self.widths.append(max(chunk.length for chunk in batch.chunks))
            seconds = self.seconds(self.widths[-1]) * self.random.uniform(0.9, 1.1)
            self.clock += seconds
            self.said += sum(map(len, new))
            self.scheduler.update(batch, StepOutput(batch.step, new, seconds=seconds))
        return self

    def verify(self, chunk: Chunk) -> list[int]:
        new = [5] * chunk.samples
        for _ in chunk.drafts:
            if self.random.random() >= self.share:
                break
            new.append(5)
        return new


def flat(width: int) -> float:
    return 0.010 + 0.0002 * width


def steep(width: int) -> float:
    return 0.010 * width


def test_drafts_that_cost_nothing_are_used_to_the_full():
    run = Simulated(0.9, flat).run(200)
    assert run.widths[-20:].count(5) >= 18
    assert run.scheduler.stats().draft_gain > 3.0


@pytest.mark.parametrize("on_device", [False, True])
def test_where_they_cost_more_than_they_bring_nothing_is_drafted(on_device):
    """Probes included, a loaded server loses next to nothing."""
    run = Simulated(0.8, steep, on_device=on_device).run(350)
    assert run.widths[-250:].count(1) > 230
    assert run.scheduler.stats().draft_gain == 1.0
    plain = 350 * 4 / (350 * steep(1))
    assert run.said / run.clock > 0.9 * plain


def test_drafting_comes_back_when_it_pays_again():
    run = Simulated(0.9, steep, count=1).run(60)
    assert run.widths[-20:].count(1) >= 18
    run.seconds = flat
    run.run(160)
    assert run.widths[-10:].count(5) >= 8


def test_a_trial_that_cannot_be_measured_is_given_up():
    """Steps with prompts in them tell nothing; a server that has no others drafts no more."""
    run = Simulated(0.8, steep).run(60)
    measured = len(run.widths)
    for index in range(600):
        params = SamplingParams(max_tokens=1)
        run.scheduler.add(Request(f"prompt {index}", [index + 1], params))
        run.run(1)
    assert run.widths[measured:].count(1) > 500


def test_drafting_that_pays_goes_on_beside_prompts():
    """The plain step that is due is one that can be measured: not one with prompts in it."""
    run = Simulated(0.9, flat).run(60)
    measured = len(run.widths)
    for index in range(600):
        run.scheduler.add(Request(f"prompt {index}", [index + 1], SamplingParams(max_tokens=1)))
        run.run(1)
    assert run.widths[measured:].count(5) > 500
    run.run(20)
    assert 1 in run.widths[-20:]


def test_a_step_that_only_catches_up_is_no_plain_one_and_no_reason_to_go_on():
    policy = DraftPolicy(2)
    speculation = Speculation(propose_on_device, 2, on_device=True, policy=policy)
    speculation.begin(1, False)
    chunk, late = (Chunk(0, 0, 0, start, 1, [7], 0, [], True) for start in (9, 8))
    for seconds, draft_chunks in ((1.0, []), (5.0, [late]), (1.0, [])):
        batch = Batch(0, [chunk], 1, draft_chunks=draft_chunks)
        speculation.observe(batch, StepOutput(0, [[5]], seconds=seconds))
    assert policy.load.plain.value == 1.0
    assert speculation.begin(1, True)
    for _ in range(40):
        batch = Batch(0, [chunk], 1, draft_chunks=[late])
        speculation.observe(batch, StepOutput(0, [[5]], seconds=1.0))
    assert not speculation.begin(1, True)


def test_a_sequence_gets_as_many_as_its_acceptance_is_worth():
    def costly(width: int) -> float:
        return 0.010 * (1 + 0.12 * (width - 1))

    lucky, middling, hopeless = (
        Simulated(share, costly, count=1).run(150) for share in (0.95, 0.5, 0.02)
    )

    def mean(run: Simulated) -> float:
        return sum(run.widths[-50:]) / 50

    assert mean(lucky) > 4.5
    assert 1.5 < mean(middling) < 4.0
    assert mean(hopeless) < 1.5


def test_sequences_of_one_batch_differ():
    run = Simulated(0.0, flat, count=2)

    def verify(chunk: Chunk) -> list[int]:
        return [5] * (chunk.length if chunk.uid == 0 else 1) if chunk.samples else []

    run.verify = verify
    run.run(150)
    assert run.scheduler.stats().num_running == 2
    batch = run.scheduler.plan()
    drafts = {chunk.uid: len(chunk.drafts) for chunk in batch.chunks}
    assert drafts[0] == 4
    assert drafts[1] <= 1


# ---- a server, in which prompts come and go -----------------------------------------------------


def tokens_per_second(speculation: Speculation | None, users: int, share: float, row: float):
    """Users who ask anew when they have been answered, of a device that takes 5 ms at least for a
    step, and `row` seconds for a token of one; a tenth of it for one of the draft model's."""
    lengths, luck = Random(1), Random(2)
    config = EngineConfig(disable_radix_cache=True)
    scheduler = Scheduler(Limits(8000, 16, 256, 4000, 1000), config, speculation=speculation)

    def ask(name: str) -> None:
        params = SamplingParams(max_tokens=lengths.randrange(50, 200), ignore_eos=True)
        scheduler.add(Request(name, [1] * lengths.randrange(100, 400), params))

    for user in range(users):
        ask(str(user))
    clock, said = 0.0, 0
    for step in range(1000):
        batch = scheduler.plan()
        widest = max(chunk.length for chunk in batch.chunks[: batch.num_decode] or batch.chunks)
        prompts = sum(chunk.length for chunk in batch.chunks[batch.num_decode :])
        rows = prompts + batch.num_decode * (widest if batch.num_decode else 0)
        drafted = 0.0
        if any(chunk.drafts for chunk in batch.chunks):
            drafted = 4 * max(0.0004, 0.1 * row * batch.num_decode)
        drafted += 0.1 * row * sum(chunk.length for chunk in batch.draft_chunks)
        seconds = (0.0003 + max(0.005, rows * row) + drafted) * luck.uniform(0.95, 1.05)
        new = [[5] * chunk.samples for chunk in batch.chunks]
        for tokens, chunk in zip(new, batch.chunks, strict=True):
            while len(tokens) <= len(chunk.drafts) and luck.random() < share:
                tokens.append(5)
        clock += seconds
        for delta in scheduler.update(batch, StepOutput(batch.step, new, seconds=seconds)):
            said += len(delta.token_ids)
            if delta.finish_reason:
                ask(f"{delta.request_id} {step}")
    return said / clock


@pytest.mark.parametrize("row", [5e-6, 1e-4])
@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("users", [1, 16, 100])
def test_a_server_is_hardly_ever_slowed_by_drafts(users, share, row):
    """Though most of its steps have prompts in them, of which nothing can be learnt. Where steps
    wait for memory and drafts are right, it is faster."""
    speculation = Speculation(
        propose_on_device, 4, on_device=True, policy=DraftPolicy(4, any_width=False)
    )
    plain = tokens_per_second(None, users, share, row)
    gain = tokens_per_second(speculation, users, share, row) / plain
    assert gain > (1.3 if share > 0.8 and row < 1e-5 else 0.95)


# ---- the draft model's holes ------------------------------------------------------------------


def decode(speculation: Speculation, scheduler: Scheduler) -> Batch:
    batch = scheduler.plan()
    new = [[5] for _ in batch.chunks]
    scheduler.update(batch, StepOutput(batch.step, new))
    return batch


def test_what_was_decoded_without_drafts_is_caught_up_before_the_next_proposal():
    speculation = Speculation(propose_on_device, 2, on_device=True, chunk_size=8)
    scheduler = Scheduler(LIMITS, speculation=speculation)
    scheduler.add(Request("r", list(range(1, 7)), SamplingParams(max_tokens=100)))
    batch = decode(speculation, scheduler)
    ((chunk,),) = (batch.draft_chunks,)  # the prompt goes through the draft model beside it
    assert (chunk.start, chunk.token_ids, chunk.samples) == (0, [1, 2, 3, 4, 5, 6], False)
    begin, speculation.begin = speculation.begin, lambda *args: begin(*args) and False
    for _ in range(14):
        batch = decode(speculation, scheduler)
        assert not batch.draft_chunks
        assert not batch.chunks[0].drafts
    speculation.begin = begin
    first, second, third = (decode(speculation, scheduler) for _ in range(3))
    assert [(c.start, c.length) for c in first.draft_chunks] == [(6, 8)]  # as many as fit
    assert first.chunks[0].drafts == []
    assert [(c.start, c.length) for c in second.draft_chunks] == [(14, 6)]
    assert second.draft_chunks[0].token_ids == [5] * 6
    assert second.chunks[0].drafts == [PENDING] * 2
    assert second.chunks[0].start == 21  # its proposal begins one token before
    assert not third.draft_chunks
    assert third.chunks[0].drafts == [PENDING] * 2
