"""Cascade groups: what is shared is the same pages, nothing saves more, and little work is done."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.config import EngineConfig
from minisgl.core.batch import MAX_CASCADE_GROUPS, Batch, CascadeGroup, StepOutput
from minisgl.core.cascade import PrefixGroups
from minisgl.core.executor import Limits
from minisgl.core.request import Request, SamplingParams
from minisgl.core.scheduler import Scheduler
from tests.world.books import check_books

PATHS = st.lists(st.integers(0, 2), max_size=6)


def physical(path: list[int]) -> list[int]:
    """Page ids of a path: the same page wherever the path up to there is the same."""
    return [hash(tuple(path[: i + 1])) % (1 << 31) for i in range(len(path))]


def arranged(groups: PrefixGroups, paths: dict[int, list[int]]) -> tuple[list[int], list]:
    uids = list(paths)
    sequences = [SimpleNamespace(uid=uid) for uid in uids]
    placed, chunks, found = groups.arrange(sequences, [f"chunk {uid}" for uid in uids])
    order = [sequence.uid for sequence in placed]
    assert chunks == [f"chunk {uid}" for uid in order]
    assert sorted(order) == sorted(uids)
    return order, found


def saved(found: list[CascadeGroup]) -> int:
    return sum((group.count - 1) * group.num_pages for group in found)


def most_saved(paths: list[tuple[int, ...]], least: int) -> int:
    """By trying all sets of prefixes of which none begins with another."""
    prefixes = {path[: i + 1] for path in paths for i in range(len(path))}
    worth = {}
    for prefix in prefixes:
        count = sum(path[: len(prefix)] == prefix for path in paths)
        if len(prefix) * (count - 1) >= least:
            worth[prefix] = len(prefix) * (count - 1)

    def sets(left: list[tuple[int, ...]]) -> Iterator[int]:
        yield 0
        for i, first in enumerate(left):
            apart = [p for p in left[i + 1 :] if p[: len(first)] != first[: len(p)]]
            yield from (worth[first] + rest for rest in sets(apart))

    return max(sets(sorted(worth)))


@settings(max_examples=300)
@given(st.lists(st.tuples(st.booleans(), PATHS), max_size=14), st.integers(1, 5), st.randoms())
def test_groups_are_the_best_there_are_after_any_comings_and_goings(moves, least, random):
    groups, paths = PrefixGroups(least), {}
    for uid, (joins, path) in enumerate(moves):
        if joins or not paths:
            paths[uid] = physical(path[:4])
            groups.join(uid, np.array(paths[uid], np.int32))
        else:
            gone = random.choice(list(paths))
            del paths[gone]
            groups.leave(gone)
            groups.leave(gone)  # it is not there any more
        for _ in range(2):  # the second time nothing has changed
            order, found = arranged(groups, paths)
            check_shared(order, found, paths, least)
            assert saved(found) == most_saved([tuple(p) for p in paths.values()], least)
        some = {u: paths[u] for u in paths if random.random() < 0.7}
        before = groups.num_spared
        order, found = arranged(groups, some)
        check_shared(order, found, some, least)
        assert groups.num_spared - before == saved(found) == groups.spared


def check_shared(order, found, paths, least) -> None:
    end = 0
    for group in found:
        assert group.first == end  # groups first, one after another
        end += group.count
        heads = [paths[uid][: group.num_pages] for uid in order[group.first : end]]
        assert all(head == heads[0] for head in heads)
        assert len(heads[0]) == group.num_pages
        assert group.num_pages * (group.count - 1) >= least


def test_pairs_beat_a_short_prefix_and_lose_to_a_long_one():
    head, tails = list(range(4)), [list(range(100 * t, 100 * t + 7)) for t in range(1, 4)]
    groups = PrefixGroups(1)
    for uid in range(6):
        groups.join(uid, np.array(head + tails[uid % 3], np.int32))
    order, found = arranged(groups, dict.fromkeys(range(6)))
    assert [(g.count, g.num_pages) for g in found] == [(2, 11)] * 3  # 33 reads against 20
    assert sorted(map(tuple, (order[0:2], order[2:4], order[4:6]))) == [(0, 3), (1, 4), (2, 5)]
    for uid in range(6, 12):
        groups.join(uid, np.array(head, np.int32))
    _, found = arranged(groups, dict.fromkeys(range(12)))
    assert found == [CascadeGroup(0, 12, 4)]  # 44 reads against 33


def test_where_runs_of_pages_are_read_together_nothing_less_counts():
    groups = PrefixGroups(3, pages_at_once=4)
    for uid in range(6):
        groups.join(uid, np.arange(3, dtype=np.int32))  # 15 reads, but no run
    assert arranged(groups, dict.fromkeys(range(6)))[1] == []
    for uid in range(6, 9):
        groups.join(uid, np.arange(100, 106, dtype=np.int32))
    _, found = arranged(groups, dict.fromkeys(range(9)))
    assert found == [CascadeGroup(0, 3, 6)]
    assert groups.spared == 4 * 2


def test_more_groups_than_a_launch_covers_leave_out_the_smallest():
    groups = PrefixGroups(1)
    for uid in range(2 * MAX_CASCADE_GROUPS + 10):
        pages = 1 + uid // 2
        groups.join(uid, np.arange(1000 * pages, 1001 * pages, dtype=np.int32))
    _, found = arranged(groups, dict.fromkeys(range(2 * MAX_CASCADE_GROUPS + 10)))
    assert sorted(g.num_pages for g in found) == list(range(6, MAX_CASCADE_GROUPS + 6))


def decode_steps(config: EngineConfig, count: int = 6) -> tuple[list[Batch], Scheduler]:
    """Batches of requests with a common prompt of 50 tokens, which are served to their ends."""
    scheduler = Scheduler(Limits(200, 16, 8, 400, 100), config)
    shared = [1 + i % 7 for i in range(50)]
    batches = []
    for i in range(count):
        scheduler.add(Request(str(i), [*shared, 50 + i], SamplingParams(max_tokens=30 + i)))
    while scheduler.has_work:
        batch = scheduler.plan()
        batches.append(batch)
        tokens = [[9] if chunk.samples else [] for chunk in batch.chunks]
        scheduler.update(batch, StepOutput(batch.step, tokens))
        check_books(scheduler)
    return batches, scheduler


def test_scheduler_names_the_group_of_a_common_prompt_until_one_is_left():
    batches, scheduler = decode_steps(EngineConfig(cascade_min_shared_tokens=48))
    grouped = [batch for batch in batches if batch.cascade_groups]
    assert {group.num_pages for batch in grouped for group in batch.cascade_groups} == {3}
    assert {batch.cascade_groups[0].count for batch in grouped} == {2, 3, 4, 5, 6}
    assert all(not batch.cascade_groups for batch in batches if batch.num_decode < 2)
    spared = sum(saved(batch.cascade_groups) for batch in batches)
    assert scheduler.stats().num_spared_tokens == 16 * spared > 0


def test_groups_that_save_too_little_are_not_named():
    least = EngineConfig(cascade_min_shared_tokens=48 * 4)
    counts = {b.cascade_groups[0].count for b in decode_steps(least)[0] if b.cascade_groups}
    assert counts == {5, 6}
    batches, scheduler = decode_steps(EngineConfig())
    assert not any(batch.cascade_groups for batch in batches)
    assert not scheduler.stats().num_spared_tokens


def test_brute_force_finds_what_is_plain_to_see():
    paths = [(1, 2), (1, 2), (1, 3), (4,)]
    assert most_saved(paths, 1) == 2
    assert most_saved(paths, 3) == 0
    assert most_saved([*paths, (4,), (1, 3)], 1) == 2 + 2 + 1


def test_who_joins_anew_counts_once_and_with_its_new_pages():
    groups, pairs = PrefixGroups(1), [[0, 1, 2, 3, *range(t, t + 6)] for t in (10, 20)]
    for uid in range(4):
        groups.join(uid, np.array(pairs[uid % 2], np.int32))
    for _ in range(10):
        groups.join(4, np.array([5, 6], np.int32))
        groups.join(4, np.array([0, 1, 2, 3], np.int32))
    _, found = arranged(groups, dict.fromkeys(range(5)))
    assert [(g.count, g.num_pages) for g in found] == [(2, 10)] * 2  # 20 reads against 16
