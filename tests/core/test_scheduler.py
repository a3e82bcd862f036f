"""The scheduler's contract, case by case: refusals, ends, sharing, pressure."""

from random import Random

import pytest

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, CopyJob, StepOutput
from minisgl.core.executor import Limits
from minisgl.core.policy import Fairness
from minisgl.core.request import Delta, Request, SamplingParams, TokenLogprobs
from minisgl.core.scheduler import MAX_SCORED, Scheduler
from minisgl.core.speculation import Speculation
from tests.world.books import check_books

EOS = 0


def make(
    num_pages=32, page_size=4, max_rows=8, max_context=512, speculation=None, **config
) -> Scheduler:
    limits = Limits(num_pages, page_size, max_rows, max_context, 1000)
    fairness = Fairness(headroom=page_size)  # little, for the pools here are small
    return Scheduler(
        limits, EngineConfig(**config), (EOS,), speculation=speculation, fairness=fairness
    )


def ask(prompt, name="r", salt="", priority=0, **params) -> Request:
    return Request(name, list(prompt), SamplingParams(**params), priority, salt)


def answer(batch: Batch, token=1, **extra) -> StepOutput:
    """Every sampling chunk says `token`, and accepts no draft."""
    tokens = [[token] if chunk.samples else [] for chunk in batch.chunks]
    return StepOutput(batch.step, tokens, **extra)


def step(scheduler: Scheduler, token=1) -> tuple[Batch, list[Delta]]:
    batch = scheduler.plan()
    assert batch is not None
    deltas = scheduler.update(batch, answer(batch, token))
    check_books(scheduler)
    return batch, deltas


def finish(scheduler: Scheduler, token=1) -> list[Delta]:
    deltas = []
    while scheduler.has_work:
        deltas += step(scheduler, token)[1]
    return deltas


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask([]), "the prompt must have at least 1 token, got 0"),
        (
            ask([1] * 129),
            "128 tokens here, as many as the KV pool holds.* the prompt has 129 tokens",
        ),
        (
            ask([1] * 100, max_tokens=30),
            "128 tokens here, .* 100 tokens and max_tokens asks for 30, .* no room: 129 together",
        ),
        (ask([1, 1000]), "below the vocabulary size 1000, got 1000"),
        (
            ask([1] * 100, min_tokens=30),
            "128 tokens here, .* 100 tokens and min_tokens asks for 30, .* no room: 129 together",
        ),
        (ask([-1, 5]), "at least 0 .*, got -1"),
        (ask([1], stop_token_ids=[1000]), "stop_token_ids: .* below .* 1000, got 1000"),
        (ask([1], logit_bias={1001: 1.0}), "logit_bias: .* below .* 1000, got 1001"),
    ],
)
def test_what_can_never_run_is_refused(request_, message):
    scheduler = make()
    with pytest.raises(ValueError, match=message):
        scheduler.add(request_)
    assert not scheduler.has_work


def test_the_context_is_a_limit_of_its_own():
    scheduler = make(max_context=20)
    with pytest.raises(ValueError, match="This model's maximum context length is 20 tokens"):
        scheduler.add(ask([1] * 21))
    with pytest.raises(ValueError, match=r"context length is 20 tokens\. .* 21 together"):
        scheduler.add(ask([1] * 15, max_tokens=7))
    scheduler.add(ask([1] * 15, max_tokens=6))
    assert finish(scheduler)[-1].finish_reason == "length"


def test_an_id_in_use_is_refused_and_free_again_after_the_end():
    scheduler = make()
    scheduler.add(ask([1], max_tokens=1))
    with pytest.raises(ValueError, match="request id 'r' is in use"):
        scheduler.add(ask([1]))
    finish(scheduler)
    scheduler.add(ask([1], max_tokens=1))


# ---- ends -----------------------------------------------------------------------------------


def test_an_omitted_max_tokens_means_what_fits():
    for scheduler, total in ((make(max_context=30), 30), (make(num_pages=5), 20)):
        scheduler.add(ask([1] * 7))
        deltas = finish(scheduler)
        assert sum(len(delta.token_ids) for delta in deltas) == total - 7
        assert deltas[-1].finish_reason == "length"


def test_a_full_prompt_yields_one_token():
    scheduler = make(max_context=16)
    scheduler.add(ask([1] * 16))
    assert [d.finish_reason for d in finish(scheduler)] == ["length"]


@pytest.mark.parametrize(
    ("params", "token", "count", "reason"),
    [
        ({}, EOS, 1, "stop"),
        ({"ignore_eos": True, "max_tokens": 5}, EOS, 5, "length"),
        ({"stop_token_ids": (7, 8)}, 8, 1, "stop"),
        ({"stop_token_ids": (7,), "ignore_eos": True, "max_tokens": 3}, EOS, 3, "length"),
        ({"min_tokens": 4}, EOS, 4, "stop"),
        ({"max_tokens": 2, "min_tokens": 2}, EOS, 2, "stop"),
        ({"min_tokens": 126}, 7, 126, "length"),  # all that 128 tokens of KV are enough for
    ],
)
def test_why_a_sequence_ends(params, token, count, reason):
    scheduler = make()
    scheduler.add(ask([1, 2, 3], **params))
    deltas = finish(scheduler, token)
    assert [delta.token_ids for delta in deltas] == [[token]] * count
    assert [delta.finish_reason for delta in deltas] == [None] * (count - 1) + [reason]
    assert deltas[-1].stop_token_id == (token if reason == "stop" else None)


def test_eos_under_overlap_costs_one_step_and_says_nothing_more():
    scheduler = make()
    scheduler.add(ask([1, 2, 3]))
    first, second = scheduler.plan(), scheduler.plan()
    assert [d.finish_reason for d in scheduler.update(first, answer(first, EOS))] == ["stop"]
    assert scheduler.has_work
    assert scheduler.plan() is None
    assert scheduler.update(second, answer(second)) == []
    assert not scheduler.has_work
    check_books(scheduler)


def test_an_end_known_by_count_is_not_planned_past():
    scheduler = make()
    scheduler.add(ask([1, 2, 3], max_tokens=2))
    first, second = scheduler.plan(), scheduler.plan()
    assert scheduler.plan() is None
    scheduler.update(first, answer(first))
    assert scheduler.plan() is None
    assert [d.finish_reason for d in scheduler.update(second, answer(second))] == ["length"]


def test_accepted_drafts_after_a_stop_are_dropped():
    propose = Speculation(lambda seq, _: [] if seq.num_pending else [5, EOS, 6], 3)
    scheduler = make(speculation=propose)
    scheduler.add(ask([1, 2, 3]))
    step(scheduler)
    batch = scheduler.plan()
    assert batch.chunks[0].drafts == [5, EOS, 6]
    (delta,) = scheduler.update(batch, StepOutput(batch.step, [[5, EOS, 6, 9]]))
    assert (delta.token_ids, delta.finish_reason) == ([5, EOS], "stop")
    check_books(scheduler)


def test_drafts_never_reach_past_the_end():
    scheduler = make(speculation=Speculation(lambda _, n: [5] * n, 10))
    scheduler.add(ask([1, 2, 3], max_tokens=4))
    step(scheduler)
    assert scheduler.plan().chunks[0].drafts == [5, 5]


def test_log_probabilities_are_passed_on():
    scheduler = make()
    scheduler.add(ask([1, 2, 3], logprobs=1, prompt_logprobs=0, max_tokens=2))
    entry = TokenLogprobs(1, -0.5, [], [])
    prompt = [TokenLogprobs(token, -1.0, [], []) for token in (2, 3)]
    batch = scheduler.plan()
    output = answer(batch, logprobs={0: [entry]}, prompt_logprobs={0: prompt})
    of_prompt, first = scheduler.update(batch, output)
    assert (of_prompt.token_ids, of_prompt.prompt_logprobs) == ([], prompt)
    assert (first.logprobs, first.prompt_logprobs) == ([entry], None)
    batch = scheduler.plan()
    (second,) = scheduler.update(batch, answer(batch, logprobs={0: [entry]}))
    assert (second.logprobs, second.prompt_logprobs) == ([entry], None)


def test_log_probabilities_of_a_prompt_come_as_it_is_computed_in_pieces():
    """Each delta has few, whatever a chunk holds; a chunk's are not kept until the last."""
    scheduler = make(num_pages=2000, max_context=8000, chunked_prefill_size=2 * MAX_SCORED + 10)
    prompt = [token % 90 for token in range(4 * MAX_SCORED)]
    scheduler.add(ask(prompt, prompt_logprobs=0, max_tokens=1))
    sizes, scored = [], []
    while scheduler.has_work:
        batch = scheduler.plan()
        chunk = batch.chunks[0]
        after = prompt[chunk.start + 1 : chunk.start + chunk.length + 1]
        entries = [TokenLogprobs(token, -1.0, [], []) for token in after]
        deltas = scheduler.update(batch, answer(batch, prompt_logprobs={0: entries}))
        sizes.append([len(delta.prompt_logprobs or ()) for delta in deltas])
        scored += [lp.token_id for delta in deltas for lp in delta.prompt_logprobs or ()]
    assert sizes == [[MAX_SCORED, MAX_SCORED, 10], [MAX_SCORED, MAX_SCORED - 11, 0]]
    assert scored == prompt[1:]


# ---- choices and aborts ---------------------------------------------------------------------


def test_n_choices_share_the_prompt_and_end_one_by_one():
    scheduler = make()
    scheduler.add(ask(range(1, 10), n=3, max_tokens=2))
    first, deltas = step(scheduler)
    assert [setup.choice for setup in first.setups] == [0]
    second, more = step(scheduler)
    assert [setup.choice for setup in second.setups] == [1, 2]
    deltas += more + finish(scheduler)
    assert {delta.choice: delta.num_cached_tokens for delta in deltas} == {0: 0, 1: 8, 2: 8}
    assert sorted(d.choice for d in deltas if d.finish_reason) == [0, 1, 2]


def test_abort_ends_what_it_names():
    scheduler = make()
    scheduler.add(ask([1, 2], name="a", n=3))
    scheduler.add(ask([1, 2], name="b"))
    step(scheduler)
    assert [(d.choice, d.finish_reason) for d in scheduler.abort("a", 1)] == [(1, "abort")]
    assert scheduler.abort("a", 1) == []
    assert scheduler.abort("unknown") == []
    assert [d.choice for d in scheduler.abort("a")] == [0, 2]
    assert [d.request_id for d in scheduler.abort("b")] == ["b"]
    assert not scheduler.has_work
    check_books(scheduler)


def test_abort_in_flight_gives_everything_back_once_and_later():
    scheduler = make(max_rows=1)
    scheduler.add(ask([1, 2], name="a"))
    scheduler.add(ask([3, 4], name="b", max_tokens=1))
    first, second = scheduler.plan(), scheduler.plan()
    scheduler.abort("a")
    check_books(scheduler)
    assert scheduler.plan() is None, "its row is in use until its steps are back"
    assert scheduler.update(first, answer(first)) == []
    assert scheduler.update(second, answer(second)) == []
    check_books(scheduler)
    assert [d.request_id for d in finish(scheduler)] == ["b"]


def test_results_come_in_order_and_fit():
    scheduler = make()
    scheduler.add(ask([1, 2, 3]))
    first, second = scheduler.plan(), scheduler.plan()
    with pytest.raises(ValueError, match="step 1 is not the oldest in flight"):
        scheduler.update(second, answer(second))
    scheduler.update(first, answer(first))
    with pytest.raises(ValueError, match="step 0 is not the oldest in flight"):
        scheduler.update(first, answer(first))


# ---- sharing --------------------------------------------------------------------------------


def test_reuse_is_exact_to_the_token():
    scheduler = make()
    scheduler.add(ask([*range(1, 11), 50, 51], name="a", max_tokens=1))
    finish(scheduler)
    scheduler.add(ask([*range(1, 11), 60, 61], name="b", max_tokens=1))
    batch, (delta,) = step(scheduler)
    (chunk,) = batch.chunks
    assert delta.num_cached_tokens == 10
    assert (chunk.start, chunk.length, chunk.token_ids) == (10, 2, [60, 61])
    assert batch.copies == [CopyJob(2, chunk.pages[2], 2)]
    assert chunk.pages[:2] == [0, 1]
    assert scheduler.stats().num_hit_tokens == 10
    assert scheduler.stats().num_queried_tokens == 24


def test_a_match_leaves_a_token_to_compute():
    scheduler = make()
    for name in "ab":
        scheduler.add(ask(range(1, 9), name=name, max_tokens=1))
        batch, (delta,) = step(scheduler)
    assert delta.num_cached_tokens == 7
    assert batch.chunks[0].token_ids == [8]
    assert batch.num_decode == 0


def test_outputs_are_cached_with_the_token_they_end_with():
    scheduler = make()
    scheduler.add(ask([1, 2, 3], name="a"))
    for token in (5, 6):
        step(scheduler, token)
    third, fourth = scheduler.plan(), scheduler.plan()
    scheduler.update(third, answer(third, EOS))
    scheduler.update(fourth, answer(fourth))
    scheduler.add(ask([1, 2, 3, 5, 6, EOS, 9, 9], name="b", max_tokens=1))
    assert step(scheduler)[1][0].num_cached_tokens == 6


def test_a_prompt_being_computed_is_waited_for_and_others_are_not():
    scheduler = make(num_pages=64)
    for name in "abc":
        scheduler.add(ask(range(1, 40), name=name, max_tokens=4))
    scheduler.add(ask(range(500, 510), name="other", max_tokens=4))
    batch, _ = step(scheduler)
    assert [setup.uid for setup in batch.setups] == [0, 3]
    batch, _ = step(scheduler)
    assert [setup.uid for setup in batch.setups] == [1, 2]
    assert [chunk.length for chunk in batch.chunks[2:]] == [3, 3]


def test_prompt_pages_are_shared_as_soon_as_their_step_is_planned():
    scheduler = make()
    scheduler.add(ask(range(1, 20), name="a"))
    scheduler.plan()
    scheduler.add(ask(range(1, 20), name="b"))
    assert scheduler.plan().chunks[1].start == 16


def test_salts_share_nothing():
    scheduler = make()
    for salt in ("", "x", "y"):
        scheduler.add(ask(range(1, 20), name=salt, salt=salt, max_tokens=1))
        assert step(scheduler)[1][0].num_cached_tokens == 0
    scheduler.add(ask(range(1, 20), name="again", salt="x", max_tokens=1))
    assert step(scheduler)[1][0].num_cached_tokens == 18


def test_prompt_log_probabilities_take_no_hit():
    scheduler = make()
    for name in "ab":
        scheduler.add(ask(range(1, 20), name=name, max_tokens=1, prompt_logprobs=1))
        batch, (*_, delta) = step(scheduler)
        assert delta.num_cached_tokens == 0
        assert batch.chunks[0].start == 0
        assert batch.setups[0].token_ids == list(range(1, 20))


def test_without_a_radix_cache_nothing_is_shared_or_kept():
    scheduler = make(disable_radix_cache=True)
    for name in "ab":
        scheduler.add(ask(range(1, 20), name=name, max_tokens=1))
        assert step(scheduler)[1][0].num_cached_tokens == 0
    stats = scheduler.stats()
    assert stats.num_free_pages == stats.num_pages
    assert stats.num_cached_pages == stats.num_hit_tokens == 0


def test_a_copy_whose_source_leaves_no_room_is_done_without():
    scheduler = make(num_pages=3)
    scheduler.add(ask(range(1, 7), name="a", max_tokens=1))
    finish(scheduler)
    # All three pages are needed, and one of them holds the two tokens to copy.
    scheduler.add(ask([*range(1, 7), *range(20, 26)], name="b", max_tokens=1))
    batch, (delta,) = step(scheduler)
    assert (batch.copies, delta.num_cached_tokens) == ([], 4)


# ---- rows, chunks and pages in a batch ------------------------------------------------------


def test_a_long_prompt_is_cut_into_chunks_behind_decode():
    scheduler = make(chunked_prefill_size=8, batch_policy="decode-first")
    scheduler.add(ask([1, 2], name="stream", max_tokens=20))
    step(scheduler)
    scheduler.add(ask(range(10, 30), name="long", max_tokens=5))
    lengths = []
    for _ in range(3):
        batch, _ = step(scheduler)
        assert batch.num_decode == 1
        assert batch.chunks[0].token_ids == []
        lengths.append((batch.chunks[1].start, batch.chunks[1].length, batch.chunks[1].samples))
    assert lengths == [(0, 7, False), (7, 7, False), (14, 6, True)]
    assert step(scheduler)[0].num_decode == 2


def test_pages_reach_the_device_once():
    scheduler = make(chunked_prefill_size=8)
    scheduler.add(ask(range(1, 11), max_tokens=8))
    patches = []
    while scheduler.has_work:
        (chunk,) = step(scheduler)[0].chunks
        patches.append((chunk.page_index, len(chunk.pages)))
    # A chunk brings the pages that it fills, the last one of the prompt too if only partly.
    assert [patch for patch in patches if patch[1]] == [(0, 2), (2, 1), (3, 1), (4, 1)]


def test_a_row_is_set_up_with_the_tokens_that_sampling_needs():
    scheduler = make()
    scheduler.add(ask([1, 2, 3], name="plain"))
    scheduler.add(ask([4, 5, 6], name="counted", presence_penalty=1.0))
    setups = step(scheduler)[0].setups
    assert [setup.token_ids for setup in setups] == [[], [4, 5, 6]]
    assert [setup.prompt_length for setup in setups] == [3, 3]


# ---- memory pressure ------------------------------------------------------------------------


def test_the_latest_is_preempted_and_resumes_where_it_was():
    scheduler = make(num_pages=8)
    scheduler.add(ask([1] * 8, name="old", max_tokens=20))
    scheduler.add(ask([2] * 8, name="new", max_tokens=20, presence_penalty=1.0))
    said = {"old": 0, "new": 0}
    epochs = []
    while scheduler.has_work:
        batch, deltas = step(scheduler)
        epochs += [(setup.uid, setup.epoch, len(setup.token_ids)) for setup in batch.setups]
        for delta in deltas:
            said[delta.request_id] += len(delta.token_ids)
    assert said == {"old": 20, "new": 20}
    assert scheduler.stats().num_preemptions == 1
    (uid, epoch, held) = epochs[-1]
    assert (uid, epoch) == (1, 1)
    assert held == 8 + 9, "what it had said is part of what it holds"


def test_under_overlap_a_preempted_sequence_keeps_its_late_token():
    scheduler = make(num_pages=6)
    scheduler.add(ask([1] * 8, name="old", max_tokens=12))
    scheduler.add(ask([2] * 8, name="new", max_tokens=12))
    said: dict[str, int] = {"old": 0, "new": 0}
    in_flight: list[Batch] = []
    while scheduler.has_work:
        batch = scheduler.plan()
        check_books(scheduler)
        if batch is not None:
            in_flight.append(batch)
        if len(in_flight) > (batch is not None):
            oldest = in_flight.pop(0)
            for delta in scheduler.update(oldest, answer(oldest)):
                said[delta.request_id] += len(delta.token_ids)
            check_books(scheduler)
    assert said == {"old": 12, "new": 12}
    assert scheduler.stats().num_preemptions == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_preemption_is_bounded(depth):
    scheduler = make(num_pages=24, max_rows=16)
    for index in range(16):
        scheduler.add(ask([index + 1] * 8, name=str(index), max_tokens=80))
    in_flight: list[Batch] = []
    said = 0
    while scheduler.has_work:
        batch = scheduler.plan()
        if batch is not None:
            in_flight.append(batch)
        if in_flight and len(in_flight) > (depth if batch is not None else 0):
            oldest = in_flight.pop(0)
            said += sum(len(delta.token_ids) for delta in scheduler.update(oldest, answer(oldest)))
            check_books(scheduler)
    assert said == 16 * 80
    # Each time, twice the headroom is asked for: at most log2 of the pool for each sequence.
    assert 0 < scheduler.stats().num_preemptions <= 16 * 5


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_preemptions_are_few_at_every_page_size(page_size):
    """What is kept free for running sequences is counted in tokens, not in pages."""
    random, num_asked, num_computed = Random(0), 0, 0
    limits = Limits(8192 // page_size, page_size, 64, 8192, 1000)
    scheduler = Scheduler(limits, EngineConfig(chunked_prefill_size=1024))
    for index in range(120):
        prompt = [random.randrange(1000) for _ in range(random.randrange(32, 400))]
        num_asked += len(prompt)
        scheduler.add(ask(prompt, name=str(index), max_tokens=random.randrange(32, 400)))
    while scheduler.has_work:
        batch = scheduler.plan()
        num_computed += sum(chunk.length for chunk in batch.chunks[batch.num_decode :])
        scheduler.update(batch, answer(batch))
    assert scheduler.stats().num_preemptions <= 50
    assert num_computed <= 1.7 * num_asked


def test_the_last_page_of_the_pool_can_be_used():
    scheduler = make(num_pages=4)
    for name in "abc":
        scheduler.add(ask([ord(name)] * 9, name=name, max_tokens=8))
    deltas = finish(scheduler)
    assert [d.request_id for d in deltas if d.finish_reason == "length"] == ["a", "b", "c"]
