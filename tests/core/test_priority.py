"""`priority`: the urgent come first, take room from others if need be, and starve nobody."""

from random import Random

import pytest

from minisgl.config import EngineConfig
from minisgl.core.costmodel import CostModel
from minisgl.core.executor import Limits
from minisgl.core.policy import FAIR, Fairness
from minisgl.core.request import Request, SamplingParams
from minisgl.core.scheduler import Scheduler
from tests.core.simulation import MEMORY_BOUND, MODEL, Counts, count_steps, seconds_on

VOCAB = 32_000
DEPTHS = pytest.mark.parametrize("depth", [0, 1])
random = Random(0)


def ask(name: str, length: int, max_tokens: int = 1, priority: int = 0, n: int = 1) -> Request:
    prompt = [random.randrange(VOCAB) for _ in range(length)]
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, n=n), priority)


def make(num_pages=8192, page_size=16, max_rows=16, fairness=FAIR, **config) -> Scheduler:
    limits = Limits(num_pages, page_size, max_rows, 1 << 20, VOCAB)
    config = EngineConfig(schedule_policy="priority", **config)
    return Scheduler(limits, config, fairness=fairness)


def preempted(scheduler: Scheduler) -> int:
    return scheduler.stats().num_preemptions


@DEPTHS
def test_the_urgent_do_not_wait_for_a_long_prompt(depth):
    arrivals = {0: [ask("long", 100_000)], 3: [ask("urgent", 32, priority=5)]}
    scheduler = make()
    assert count_steps(scheduler, arrivals, depth=depth).waits["urgent"] == 1
    assert not preempted(scheduler)


@DEPTHS
def test_the_urgent_do_not_wait_for_a_row(depth):
    scheduler = make()
    low = [ask(str(index), 32, 300) for index in range(16)]
    arrivals = {0: low, 10: [ask("urgent", 32, 5, priority=5)]}
    counts = count_steps(scheduler, arrivals, depth=depth)
    assert counts.waits["urgent"] <= 3
    assert counts.ends[0] == "urgent"
    assert len(counts.ends) == 17
    assert preempted(scheduler) == 1


@DEPTHS
def test_the_urgent_do_not_wait_for_pages(depth):
    """Twelve streams of 500 tokens hold nearly all of 6,400; six of them must go, and come back."""
    scheduler = make(num_pages=400)
    low = [ask(str(index), 500, 20) for index in range(12)]
    arrivals = {0: low, 6: [ask("urgent", 3000, priority=5)]}
    counts = count_steps(scheduler, arrivals, depth=depth)
    assert counts.waits["urgent"] <= 5  # three to begin, and two steps of prompt
    assert len(counts.ends) == 13
    assert 5 <= preempted(scheduler) <= 7


@DEPTHS
def test_an_urgent_prompt_as_large_as_the_pool_does_not_wait_for_what_is_kept_free(depth):
    """For those that must go, no tokens need be kept free."""
    scheduler = make(num_pages=400)
    low = [ask(str(index), 400, 300) for index in range(12)]
    arrivals = {0: low, 6: [ask("urgent", 6300, priority=5)]}
    counts = count_steps(scheduler, arrivals, depth=depth)
    assert counts.waits["urgent"] <= 7  # three to begin, and four steps of prompt
    assert len(counts.ends) == 13


@DEPTHS
def test_several_urgent_ones_take_their_rows_at_once(depth):
    scheduler = make()
    low = [ask(str(index), 32, 300) for index in range(16)]
    urgent = [ask(f"urgent {index}", 32, 5, priority=index) for index in range(1, 9)]
    counts = count_steps(scheduler, {0: low, 10: urgent}, depth=depth)
    assert max(counts.waits[request.id] for request in urgent) <= 4
    assert preempted(scheduler) == 8


def test_a_prompt_of_higher_priority_goes_before_one_under_way_and_one_of_lower_does_not():
    arrivals = {
        0: [ask("long", 20_000, priority=1)],
        2: [ask("low", 32), ask("high", 10_000, priority=2), ask("equal", 32, priority=1)],
    }
    counts = count_steps(make(), arrivals)
    assert counts.ends == ["high", "equal", "long", "low"]


def test_nobody_is_preempted_by_equals_or_in_vain():
    scheduler = make(num_pages=100)
    arrivals = {
        0: [ask("equal", 1000, 30, priority=5), ask("low", 400, 30)],
        5: [ask("urgent", 800, priority=5)],  # what `low` holds would not do
    }
    counts = count_steps(scheduler, arrivals)
    assert counts.ends == ["equal", "low", "urgent"]
    assert not preempted(scheduler)


@DEPTHS
def test_a_victim_keeps_its_place_after_some_preemptions(depth):
    """One row, a long answer in it, and an urgent request every ten steps."""
    scheduler = make(max_rows=1, fairness=Fairness(max_displaced=3))
    arrivals = {10 * step: [ask(f"urgent {step}", 8, priority=1)] for step in range(1, 30)}
    counts = count_steps(scheduler, arrivals | {0: [ask("low", 8, 100)]}, depth=depth)
    assert preempted(scheduler) == 3
    assert all(counts.waits[f"urgent {step}"] <= 3 for step in (1, 2, 3))
    assert counts.ends.index("low") < counts.ends.index("urgent 15")


def test_under_a_target_the_urgent_take_the_place_of_others():
    """The target holds for some of the low ones only; a stream more of any kind is too much."""
    limits = Limits(8192, 16, 64, 1 << 20, VOCAB)
    config = EngineConfig(schedule_policy="priority", itl_target_ms=1.5)
    scheduler = Scheduler(limits, config, cost_model=CostModel(MODEL, MEMORY_BOUND))
    low = [ask(str(index), 3000, 300) for index in range(12)]
    arrivals = {0: low, 100: [ask("urgent", 3000, priority=1)]}
    counts = count_steps(scheduler, arrivals, seconds=seconds_on(MEMORY_BOUND))
    assert 2 <= counts.most_running < 12
    assert counts.ends[0] == "urgent"
    assert preempted(scheduler) == 1


@pytest.mark.parametrize("obstacle", ["pages", "prefix"])
def test_under_a_target_nobody_leaves_for_one_that_cannot_come_yet(obstacle):
    """It lacks pages that no lower one holds, or waits for a prefix that another computes."""
    limits = Limits(1500, 16, 64, 1 << 20, VOCAB)
    config = EngineConfig(schedule_policy="priority", itl_target_ms=1.5, chunked_prefill_size=512)
    scheduler = Scheduler(limits, config, cost_model=CostModel(MODEL, MEMORY_BOUND))
    low = [ask(str(index), 1000, 400) for index in range(8)]
    first = ask("first", 12_000, 600, priority=5)
    shared = [*first.prompt_token_ids[:11_900], 1] if obstacle == "prefix" else [1] * 20_000
    second = Request("second", shared, SamplingParams(max_tokens=1), priority=5)
    arrivals = {0: low, 200: [first, second]}
    counts = count_steps(scheduler, arrivals, seconds=seconds_on(MEMORY_BOUND), most=215)
    assert "first" not in counts.ends
    assert scheduler.stats().num_running > 1
    assert preempted(scheduler) <= 1, "for the first"


def test_a_low_prompt_under_way_goes_on_beside_endless_urgent_ones():
    arrivals = {step: [ask(str(step), 40, priority=1)] for step in range(1, 300)}
    arrivals[0] = [ask("low", 100)]
    counts = count_steps(make(chunked_prefill_size=32), arrivals, most=300)
    assert "low" in counts.ends


def test_what_comes_first_by_age_leaves_the_urgent_their_half():
    scheduler = make(fairness=Fairness(max_passed=1))  # all age, beginning with the long one
    arrivals = {step: [ask(str(step), 32, priority=5)] for step in range(3, 30)}
    counts = count_steps(scheduler, arrivals | {0: [ask("long", 100_000)]})
    assert {counts.waits[str(step)] for step in range(3, 30)} == {1}
    assert counts.waits["long"] <= 51


def serve_beside_endless_urgent_ones(seed: int) -> tuple[Counts, int]:
    """Low requests of all shapes in a machine that urgent ones alone would more than fill."""
    random = Random(seed)
    scheduler = make(
        num_pages=random.choice([12, 40]) * 4,
        page_size=4,
        max_rows=random.choice([1, 2, 4]),
        fairness=Fairness(
            max_passed=random.choice([2, 4]),
            max_displaced=random.choice([1, 4]),
            headroom=random.choice([1, 4]),
        ),
        chunked_prefill_size=random.choice([4, 32]),
    )
    low = [ask(f"low {i}", random.randrange(1, 40), random.randrange(1, 40)) for i in range(6)]
    arrivals: dict[int, list[Request]] = {0: low}
    for step in range(600):
        urgent = ask(str(step), random.randrange(1, 20), random.randrange(1, 10), priority=1)
        arrivals.setdefault(step, []).append(urgent)
    counts = count_steps(scheduler, arrivals, depth=random.choice([0, 1]), most=600)
    assert scheduler.stats().num_waiting > 20, "urgent ones wait all the time"
    return counts, preempted(scheduler)


def test_low_priority_always_finishes():
    num_preempted = 0
    for seed in range(16):
        counts, some = serve_beside_endless_urgent_ones(seed)
        num_preempted += some
        late = {f"low {index}" for index in range(6)} - set(counts.ends)
        assert not late, f"seed {seed}: {late} never finish"
    assert num_preempted > 50  # or the traces would show nothing
