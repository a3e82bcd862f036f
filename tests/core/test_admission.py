"""Failed admissions are remembered: exactly as far as trying again would fail, and for nothing."""

from random import Random

import pytest

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, StepOutput
from minisgl.core.executor import Limits
from minisgl.core.kvcache import KVCache, Match
from minisgl.core.pages import PagePool
from minisgl.core.radix import RadixTree
from minisgl.core.request import Request, SamplingParams
from minisgl.core.scheduler import Scheduler
from minisgl.core.sequence import Sequence
from tests.world.trial import run_trial


def test_whoever_could_be_admitted_is_not_skipped(monkeypatch):
    """Whenever the memory says no, trying says no too: in random traces, by counting pages."""
    refused, num_skipped = KVCache.refused, 0

    def compared(cache: KVCache, sequence: Sequence, headroom: int) -> Match | None:
        nonlocal num_skipped
        remembered = refused(cache, sequence, headroom)
        if remembered is None:
            return None
        num_skipped += 1
        match, pool = cache.match(sequence), cache.pool
        available = pool.num_available - pool.num_idle_among(match.pages)
        need = pool.pages_for(sequence.num_tokens) - len(match.pages)
        assert not cache.is_fresh(match), "it is to be tried in the next plan"
        assert need + headroom > available, "it could be admitted"
        return remembered

    most_matched = KVCache.most_matched

    def bounded(cache: KVCache, sequence: Sequence) -> int:
        most = most_matched(cache, sequence)
        tokens = sequence.tokens(sequence.num_tokens - 1)
        pages, _, num_copied = cache.tree.match(sequence.request.cache_salt, tokens)
        assert len(pages) * cache.page_size + num_copied <= most
        return most

    monkeypatch.setattr(KVCache, "refused", compared)
    monkeypatch.setattr(KVCache, "most_matched", bounded)
    for seed in range(400):
        try:
            run_trial(seed, num_requests=8)
        except Exception as error:
            error.add_note(f"in the trace of seed {seed}")
            raise
    assert num_skipped > 600, "the traces are worth running only while admissions fail"


@pytest.fixture
def num_matches(monkeypatch) -> list[int]:
    """One entry, the number of prefixes looked up for admission."""
    match, count = KVCache.match, [0]

    def counted(*args):
        count[0] += 1
        return match(*args)

    monkeypatch.setattr(KVCache, "match", counted)
    return count


def crowded(page_size: int) -> Scheduler:
    """Sequences that decode in a full pool and others that wait, with a prefix in common."""
    random = Random(0)
    limits = Limits((1600 + 1184) // page_size, page_size, 64, 4000, 1000)
    scheduler = Scheduler(limits, EngineConfig(chunked_prefill_size=512))
    shared = [random.randrange(1000) for _ in range(1600)]
    for index in range(30):
        own = [random.randrange(1000) for _ in range(200)]
        scheduler.add(Request(str(index), shared + own, SamplingParams(max_tokens=50)))
    while step(scheduler).num_decode < scheduler.stats().num_running:
        pass
    return scheduler


def step(scheduler: Scheduler) -> Batch:
    batch = scheduler.plan()
    tokens = [[1] if chunk.samples else [] for chunk in batch.chunks]
    scheduler.update(batch, StepOutput(batch.step, tokens))
    return batch


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_full_pool_costs_decode_nothing(page_size, num_matches):
    scheduler = crowded(page_size)
    before = scheduler.stats()
    num_matches[0] = 0
    for _ in range(4):
        assert step(scheduler).num_decode == before.num_running
    assert num_matches == [0]
    for name in "01":
        scheduler.abort(name)
    assert step(scheduler).setups
    assert 1 <= num_matches[0] <= before.num_waiting, "each is tried once when pages come back"


def test_evicting_for_decode_does_not_make_lpm_compare_again(num_matches):
    scheduler = Scheduler(Limits(2400, 1, 8, 4000, 1000), EngineConfig(schedule_policy="lpm"))
    scheduler.add(Request("old", [1] * 1200, SamplingParams(max_tokens=1)))
    step(scheduler)
    for index in range(9):
        length = 8 if index < 5 else 1500  # of which one fits
        scheduler.add(Request(str(index), [index + 2] * length, SamplingParams(max_tokens=500)))
    while step(scheduler).num_decode < 6:
        pass
    num_matches[0], before = 0, scheduler.stats()
    for _ in range(100):
        assert step(scheduler).num_decode == 6
    assert scheduler.stats().num_idle_pages < before.num_idle_pages - 100
    assert num_matches == [0]


def test_pages_for_decode_are_evicted_many_at_once(monkeypatch):
    evict, num_calls = RadixTree.evict, 0

    def counted(tree: RadixTree, count: int) -> int:
        nonlocal num_calls
        num_calls += 1
        return evict(tree, count)

    monkeypatch.setattr(RadixTree, "evict", counted)
    scheduler = Scheduler(Limits(2400, 1, 8, 4000, 1000), EngineConfig())
    scheduler.add(Request("old", [1] * 2399, SamplingParams(max_tokens=1)))
    step(scheduler)
    for index in range(8):
        scheduler.add(Request(str(index), [index + 2] * 8, SamplingParams(max_tokens=100)))
    while step(scheduler).num_decode < 8:
        pass
    num_calls, before = 0, scheduler.stats()
    for _ in range(32):
        step(scheduler)
    assert before.num_free_pages < 64
    assert before.num_idle_pages - scheduler.stats().num_idle_pages >= 8 * 32 - 64
    assert 1 <= num_calls <= 8, "each costs as much for one page as for many"


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_chunk_touches_the_pages_that_it_fills(page_size, monkeypatch):
    """Beside taking all that its prompt needs, once, and comparing tokens."""
    touched = []
    for name in ("hold", "drop"):
        method = getattr(PagePool, name)

        def counted(pool: PagePool, pages, method=method):
            touched.append(len(pages))
            method(pool, pages)

        monkeypatch.setattr(PagePool, name, counted)
    scheduler = Scheduler(
        Limits(4096 // page_size, page_size, 8, 4096, 1000),
        EngineConfig(chunked_prefill_size=256),
    )
    random = Random(0)
    prompt = [random.randrange(1000) for _ in range(4000)]
    scheduler.add(Request("long", prompt, SamplingParams(max_tokens=1)))
    for _ in range(15):
        touched.clear()
        (chunk,) = step(scheduler).chunks
        assert chunk.length == 256
        assert len(chunk.pages) == 256 // page_size, "the pages sent to the device"
        assert sum(touched) <= 256 // page_size
