"""The radix tree: which pages hold the KV of which token prefixes, exact to the token.

After RadixAttention (Zheng et al., SGLang, 2024), with reference counts in place of locks. An
edge is a run of tokens with their pages. Edges start and branch at page borders; only the last
page of a leaf may be partly filled, and siblings may share tokens inside their first page, so
that any cached prefix is found to the token: whole pages are shared by reference, and of the
page where a prompt diverges the first tokens can be copied.
"""

import heapq
from bisect import bisect_left
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from minisgl.core.pages import NO_PAGES, PagePool, Pages
from minisgl.core.tokens import Tokens, common_prefix

_label = attrgetter("label")


@dataclass(eq=False, slots=True)
class Node:
    """One edge and what hangs below it."""

    key: Tokens  # int32 [n]; as the pages, replaced and never changed
    pages: Pages  # int32 [ceil(n / page_size)]
    parent: "Node | None"  # None: a root, or no longer in the tree
    used: int  # when last matched or extended, in ticks of the tree
    children: "list[Node]" = field(default_factory=list)  # sorted by label
    label: bytes = b""  # the first page's tokens, big-endian: sorts as the tokens do
    queued: bool = False  # has an entry in the heap of leaves
    namespace: str | None = None  # of a root


class RadixTree:
    """Prefixes of token runs, one root per namespace; holds one reference to each of its pages.

    Leaves wait for eviction in a heap ordered by last use. Its entries go stale when a leaf is
    used, extended or removed, and are looked at again only when they reach the top. A leaf found
    there with its last page in use is *parked* under that page until `unpark` brings it back.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_size = pool.page_size
        self.roots: dict[str, Node] = {}
        self._clock = 0
        self._leaves: list[tuple[int, int, Node]] = []
        self._entries = 0
        self.parked: dict[int, Node] = {}
        self._is_parked = np.zeros(pool.num_pages, np.bool_)  # the keys of `parked`

    def match(self, namespace: str, tokens: Tokens) -> tuple[Pages, int | None, int]:
        """The longest cached prefix of `tokens`, marked as used now.

        Returns its whole pages, the page of which only the first tokens match (None when the
        match ends at a page border), and the number of those tokens.
        """
        self._clock += 1
        root = self.roots.get(namespace)
        if root is None:
            return NO_PAGES, None, 0
        _, _, runs, child, inside = self._walk(root, tokens)
        source, rest = None, 0
        if child is not None:
            whole, rest = divmod(inside, self._page_size)
            runs.append(child.pages[:whole])
            source = int(child.pages[whole]) if rest else None
        return runs[0] if len(runs) == 1 else np.concatenate((NO_PAGES, *runs)), source, rest

    def continuation(self, namespace: str, tokens: Tokens, count: int) -> list[int]:
        """Up to `count` tokens with which a run in the tree goes on after `tokens`."""
        root = self.roots.get(namespace)
        if root is None:
            return []
        node, done, _, child, inside = self._walk(root, tokens)
        if child is not None:
            if done + inside < len(tokens):
                return []
            return list[int](child.key[inside : inside + count].tolist())
        if done < len(tokens) or not node.children:
            return []
        latest = max(node.children, key=attrgetter("used"))
        return list[int](latest.key[:count].tolist())

    def insert(self, namespace: str, tokens: Tokens, pages: Pages) -> None:
        """Store `tokens` with their `pages`; what is there already stays as it is.

        The last page may be partly filled. A shorter run that ended inside it is replaced.
        """
        if not len(tokens):
            return
        self._clock += 1
        root = self.roots.get(namespace)
        if root is None:
            root = Node(np.empty(0, np.int32), NO_PAGES, None, 0, namespace=namespace)
            self.roots[namespace] = root
        node, done, _, child, inside = self._walk(root, tokens)
        if child is not None:
            if done + inside == len(tokens):
                return
            if inside == len(child.key):  # a partly filled end, hence a leaf
                self._extend(child, tokens[done:], pages[done // self._page_size :])
                return
            whole = inside // self._page_size
            if whole:
                node = self._split(child, whole)
                done += whole * self._page_size
        elif done == len(tokens):
            return
        rest, new = tokens[done:], pages[done // self._page_size :]
        if node.children or node.parent is None:
            self._pool.cache(new)
            self._attach(Node(rest.copy(), new.copy(), node, self._clock))
        else:
            start = done - len(node.key)
            self._extend(node, tokens[start:], pages[start // self._page_size :])

    def evict(self, count: int) -> int:
        """Free at least `count` pages, least recently used leaf first, a leaf's end first.

        Returns how many were freed: fewer when all others are in use.
        """
        freed = 0
        while freed < count and self._leaves:
            used, _, leaf = heapq.heappop(self._leaves)
            leaf.queued = False
            if leaf.children or leaf.parent is None:
                continue
            if leaf.used != used:
                self._queue(leaf)
                continue
            num_idle = self._pool.num_idle_last(leaf.pages[freed - count :])
            freed += num_idle
            keep = len(leaf.pages) - num_idle
            if not keep:
                self._detach(leaf)
                continue
            if num_idle:
                self._pool.uncache(leaf.pages[keep:])
                leaf.pages = leaf.pages[:keep]
                leaf.key = leaf.key[: keep * self._page_size]
            if self._pool.is_idle(leaf.pages[-1]):
                self._queue(leaf)
            else:
                self.parked[int(leaf.pages[-1])] = leaf
                self._is_parked[leaf.pages[-1]] = True
        return freed

    def unpark(self, pages: list[int] | Pages) -> None:
        """`pages` have lost a holder: leaves that were parked under one may be evictable."""
        index = np.asarray(pages, np.intp)
        for page in index[self._is_parked[index]].tolist():
            self._is_parked[page] = False
            self._queue(self.parked.pop(page))

    def _walk(
        self, root: Node, tokens: Tokens
    ) -> tuple[Node, int, list[Pages], "Node | None", int]:
        """Follow `tokens` down from `root`.

        Returns the last node passed to its end, the number of tokens and the runs of pages up to
        there, and the child inside whose edge (or at whose partly filled end) the run ends, if
        any, with the number of its tokens that match.
        """
        node, done, runs = root, 0, list[Pages]()
        while done < len(tokens):
            child, inside = self._best_child(node, tokens, done)
            if child is None:
                break
            child.used = self._clock
            if inside < len(child.key) or inside % self._page_size:
                return node, done, runs, child, inside
            runs.append(child.pages)
            done += inside
            node = child
        return node, done, runs, None, 0

    def _best_child(self, node: Node, tokens: Tokens, start: int) -> tuple["Node | None", int]:
        """The child that shares most with `tokens[start:]`, and how many tokens it shares.

        In sorted order the longest common prefix is next to the place of the label looked for.
        """
        label = self._make_label(tokens[start : start + self._page_size])
        index = bisect_left(node.children, label, key=_label)
        best, most = None, 0
        for child in node.children[max(index - 1, 0) : index + 1]:
            shared = common_prefix(child.key, 0, tokens, start, len(child.key))
            if shared > most:
                best, most = child, shared
        return best, most

    def _make_label(self, first_page: Tokens) -> bytes:
        return first_page.astype(">i4").tobytes()

    def _attach(self, node: Node) -> None:
        assert node.parent is not None
        node.label = self._make_label(node.key[: self._page_size])
        siblings = node.parent.children
        siblings.insert(bisect_left(siblings, node.label, key=_label), node)
        self._queue(node)

    def _extend(self, leaf: Node, key: Tokens, pages: Pages) -> None:
        """Lengthen a leaf to `key` and `pages`, which may replace its partly filled last page.

        Its label may grow, but stays in order: no sibling's first page begins with another's.
        """
        whole = len(leaf.key) // self._page_size
        old = leaf.pages[whole:]
        leaf.key = key.copy()
        leaf.pages = np.concatenate((leaf.pages[:whole], pages[whole:]))
        self._pool.cache(leaf.pages[whole:])
        if len(old):
            self._pool.uncache(old)
        leaf.used = self._clock
        leaf.label = self._make_label(leaf.key[: self._page_size])
        self._queue(leaf)

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut an edge after `num_pages` pages; returns the new upper part."""
        assert node.parent is not None
        size = num_pages * self._page_size
        upper = Node(node.key[:size], node.pages[:num_pages], node.parent, node.used)
        upper.label = node.label
        siblings = node.parent.children
        siblings[bisect_left(siblings, node.label, key=_label)] = upper
        upper.children = [node]
        node.parent, node.key, node.pages = upper, node.key[size:], node.pages[num_pages:]
        node.label = self._make_label(node.key[: self._page_size])
        return upper

    def _detach(self, node: Node) -> None:
        """Take `node` and everything below it out of the tree."""
        parent = node.parent
        assert parent is not None
        del parent.children[bisect_left(parent.children, node.label, key=_label)]
        stack = [node]
        while stack:
            gone = stack.pop()
            stack += gone.children
            gone.parent = None
            self._pool.uncache(gone.pages)
        if not parent.children:
            if parent.namespace is None:
                self._queue(parent)
            else:
                del self.roots[parent.namespace]

    def _queue(self, leaf: Node) -> None:
        if not leaf.queued:
            leaf.queued = True
            self._entries += 1
            heapq.heappush(self._leaves, (leaf.used, self._entries, leaf))
