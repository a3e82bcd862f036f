"""Pages and the radix tree against models that are too simple to be wrong."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.core.pages import PagePool
from minisgl.core.radix import RadixTree
from tests.world.books import check_pool, nodes, pages_of


def tokens_of(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], np.int32)


def shared(a: str, b: str) -> int:
    """How many characters two texts share from their start."""
    return next((i for i, c in enumerate(a) if b[i : i + 1] != c), len(a))


class Library:
    """A radix tree beside a list of the runs stored in it; each run takes pages of its own.

    Page contents are remembered, so that a match can be checked: what a page holds from the
    beginning of the run, not only inside the page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.tree = RadixTree(self.pool)
        self.page_size = page_size
        self.prefix: dict[int, tuple[str, str]] = {}  # page -> namespace, text up to its end
        self.stored: list[tuple[str, str]] = []

    def store(self, text: str, namespace: str = "") -> list[int]:
        """As an ended sequence does: take pages, insert, let go."""
        count = self.pool.pages_for(len(text))
        if count > self.pool.num_free:
            self.tree.evict(count - self.pool.num_free)
        pages = self.pool.take(count)
        for index, page in enumerate(pages):
            self.prefix[page] = namespace, text[: (index + 1) * self.page_size]
        self.tree.insert(namespace, tokens_of(text), pages)
        self.drop(pages)
        return pages

    def drop(self, pages: list[int]) -> None:
        self.pool.drop(pages)
        self.tree.unpark(pages)

    def matched(self, text: str, namespace: str = "") -> int:
        """Length of the match, after checking that every page holds what it should."""
        pages, source, extra = self.tree.match(namespace, tokens_of(text))
        for index, page in enumerate(pages):
            assert self.prefix[page] == (namespace, text[: (index + 1) * self.page_size])
        length = len(pages) * self.page_size + extra
        if source is not None:
            assert 0 < extra < self.page_size
            where, prefix = self.prefix[source]
            assert where == namespace
            assert prefix.startswith(text[:length])
            assert len(prefix) <= (len(pages) + 1) * self.page_size
        return length

    def check(self, held: tuple[int, ...] = ()) -> None:
        pages = pages_of(self.tree)
        check_pool(self.pool, [*pages, *held], pages)
        for _, prefix, node in nodes(self.tree):
            whole = len(node.key) % self.page_size == 0
            assert whole or not node.children, "only a leaf may end inside a page"
            assert len(node.pages) == self.pool.pages_for(len(node.key))
            assert len(node.key), "an empty edge"
            last = int(node.pages[-1])
            parked = self.tree.parked.get(last) is node and not self.pool.is_idle(last)
            assert node.children or node.queued or parked, "a leaf that nobody would evict"
            labels = [child.label for child in node.children]
            assert labels == sorted(labels)
            assert len(prefix) >= len(node.key)


texts = st.text("ab", min_size=1, max_size=20)


@given(
    st.sampled_from([1, 2, 3, 4, 16]),
    st.lists(st.tuples(texts, st.sampled_from(["", "s"])), max_size=12),
    st.lists(texts, min_size=1, max_size=6),
)
def test_the_longest_stored_prefix_is_found_to_the_token(page_size, stored, queries):
    library = Library(400, page_size)
    for text, namespace in stored:
        library.store(text, namespace)
        library.check()
    for query in [*queries, *(text for text, _ in stored)]:
        for namespace in ("", "s"):
            common = [shared(query, text) for text, where in stored if where == namespace]
            assert library.matched(query, namespace) == max(common, default=0)


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
def test_eviction_keeps_the_books_and_what_is_in_use(page_size):
    random = Random(page_size)
    library = Library(48 // page_size + 3, page_size)
    held: list[list[int]] = []
    for _ in range(1500):
        text = "".join(random.choice("ab") for _ in range(random.randrange(1, 24)))
        if random.random() < 0.3:
            pages, _, _ = library.tree.match("", tokens_of(text))
            library.pool.hold(pages)
            held.append(pages)
        if held and (random.random() < 0.35 or len(held) > 3):
            library.drop(held.pop(random.randrange(len(held))))
        if library.pool.pages_for(len(text)) <= library.pool.num_available:
            library.store(text)
        before = {page: library.prefix[page] for pages in held for page in pages}
        library.check(tuple(page for pages in held for page in pages))
        library.matched(text)
        assert all(library.prefix[page] == prefix for page, prefix in before.items())
    for pages in held:
        library.drop(pages)
    assert library.tree.evict(10_000) + library.pool.num_free >= library.pool.num_pages
    assert library.pool.num_free == library.pool.num_pages
    assert not pages_of(library.tree)


def test_the_least_recently_used_leaf_goes_first_and_its_end_before_its_beginning():
    library = Library(8, 2)
    library.store("aabb")
    library.store("bbaa")
    library.store("abab")
    assert library.matched("aabb") == 4  # used again
    assert library.tree.evict(1) == 1
    assert library.matched("bbaa") == 2  # its end is gone; and it is in use again
    assert library.tree.evict(1) == 1
    assert library.matched("abab") == 2
    assert library.matched("aabb") == 4
    library.check()


def test_a_shared_prefix_outlives_its_branches():
    library = Library(16, 2)
    library.store("aaaabb")
    library.store("aaaaba")
    assert library.tree.evict(2) == 2
    assert library.matched("aaaabb") == 4
    library.check()


def test_a_leaf_in_use_is_passed_over_and_comes_back():
    library = Library(6, 2)
    first = library.store("aabb")
    library.store("bbaa")
    library.pool.hold(first)
    assert library.tree.evict(6) == 2
    assert library.matched("aabb") == 4
    library.drop(first)
    assert library.tree.evict(6) == 2
    assert library.pool.num_free == 6


def test_a_longer_run_replaces_a_partly_filled_page():
    library = Library(8, 4)
    library.store("aaaab")
    assert library.pool.num_free == 6
    library.store("aaaabb")
    assert library.pool.num_free == 6
    assert library.matched("aaaabb") == 6
    library.store("aaaab")  # nothing new
    assert library.pool.num_free == 6
    library.check()


def test_siblings_share_tokens_inside_a_page():
    library = Library(8, 4)
    library.store("aaab")
    library.store("aabb")
    library.store("abbb")
    assert library.matched("aabab") == 3
    assert library.matched("abba") == 3
    assert library.matched("aaa") == 3
    assert library.matched("b") == 0


def test_the_pool_refuses_what_would_corrupt_it():
    pool = PagePool(4, 2)
    pages = pool.take(3)
    assert pages.tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="2 pages asked of 1 free"):
        pool.take(2)
    with pytest.raises(RuntimeError, match=r"free pages held: \[3\]"):
        pool.hold([2, 3])
    pool.drop(pages)
    with pytest.raises(RuntimeError, match=r"dropped more often than held: \[1\]"):
        pool.drop([1])


@given(st.lists(st.tuples(st.sampled_from("thdcu"), st.integers(0, 9)), max_size=60))
def test_the_pool_counts_like_a_dictionary(actions):
    pool, refs, cached = PagePool(10, 4), dict.fromkeys(range(10), 0), set()
    for action, page in actions:
        if action == "t" and pool.num_free:
            for taken in pool.take(min(1 + page % 3, pool.num_free)):
                assert refs[taken] == 0
                refs[taken] = 1
        elif action == "h" and refs[page]:
            pool.hold([page])
            refs[page] += 1
        elif action == "d" and refs[page] > (page in cached):
            pool.drop([page])
            refs[page] -= 1
        elif action == "c" and refs[page] and page not in cached:
            pool.cache([page])
            refs[page] += 1
            cached.add(page)
        elif action == "u" and page in cached:
            pool.uncache([page])
            refs[page] -= 1
            cached.discard(page)
        check_pool(pool, [p for p, count in refs.items() for _ in range(count)], sorted(cached))
        idle = [p for p in cached if refs[p] == 1]
        assert pool.num_idle == len(idle)
        assert all(pool.is_idle(p) == (p in idle) for p in range(10))
        held = [p for p, count in refs.items() if count > (p in cached)]
        returning = [p for p in held if refs[p] - (p in cached) == 1]
        assert pool.num_returning(held) == len(returning)
