"""The books of the scheduler compared with each other, exactly."""

from collections.abc import Collection, Iterator

import numpy as np

from minisgl.core.pages import PagePool
from minisgl.core.radix import Node, RadixTree
from minisgl.core.scheduler import Scheduler
from minisgl.core.sequence import RUNNING


def nodes(tree: RadixTree) -> Iterator[tuple[str, tuple[int, ...], Node]]:
    """Every node with its namespace and its whole prefix."""
    for namespace, root in tree.roots.items():
        stack = [((), root)]
        while stack:
            prefix, node = stack.pop()
            prefix += tuple(node.key.tolist())
            if node is not root:
                yield namespace, prefix, node
            stack += [(prefix, child) for child in node.children]


def pages_of(tree: RadixTree) -> list[int]:
    return [page for _, _, node in nodes(tree) for page in node.pages.tolist()]


def check_pool(pool: PagePool, held: Collection[int], cached: Collection[int]) -> None:
    """`held` names a page once for each holder."""
    expected = np.bincount(np.array([*held], np.intp), minlength=pool.num_pages)
    marks = np.zeros(pool.num_pages, np.bool_)
    marks[[*cached]] = True
    assert pool.refs.tolist() == expected.tolist()
    free = sorted(pool.free[: pool.num_free].tolist())
    assert free == (expected == 0).nonzero()[0].tolist()
    assert pool.cached.tolist() == marks.tolist()
    assert pool.num_cached == len(cached)
    assert pool.num_idle == int((marks & (expected == 1)).sum())


def check_books(scheduler: Scheduler) -> None:
    """Who holds pages, rows and steps, between plans."""
    running = scheduler.running
    in_flight = {seq for plan in scheduler.plans for seq in plan.sequences}
    leaving = [seq for seq in in_flight if seq.status is not RUNNING]
    holders, cached = [*running.sequences, *leaving], pages_of(running.cache.tree)
    held = [page for seq in holders for page in seq.kv.pages.tolist()]
    check_pool(running.cache.pool, cached + held, cached)
    rows = [seq.row for seq in holders]
    assert sorted(rows + running.free_rows) == list(range(scheduler.limits.max_rows))
    assert running.leaving.keys() == set(leaving)
    assert not any(seq.kv.count or seq.row >= 0 or seq.in_flight for seq in running.waiting)
