"""Which decoding sequences begin with the same pages, kept up to date as they come and go.

A trie over the page ids of decoding sequences, its unbranched runs compressed (Morrison, PATRICIA,
1968). While a sequence decodes, the pages of the tokens it was fed stay as they are, so its pages
are looked at only when it joins. Cascade attention reads the pages of a group once for all; a
sequence can be in one group only, though it may share a short prefix with many and a longer one
with few. On each path of the trie either a node's sequences are one group, or its children decide,
whichever saves more reads.
"""

from dataclasses import dataclass, field
from heapq import nlargest
from operator import attrgetter, itemgetter

import numpy as np

from minisgl.core.batch import MAX_CASCADE_GROUPS, CascadeGroup, Chunk
from minisgl.core.pages import NO_PAGES, Pages
from minisgl.core.sequence import Sequence
from minisgl.core.tokens import common_prefix


@dataclass(eq=False, slots=True)
class PrefixNode:
    """An edge of pages and what hangs below it; `count` sequences have all pages up to its end."""

    pages: Pages
    parent: "PrefixNode | None"
    depth: int  # pages from the root to this edge's end
    children: "dict[int, PrefixNode]" = field(default_factory=dict)  # by their first page
    count: int = 0
    below: int = 0  # page reads that the children save together
    saved: int = 0  # those saved by this node or by its children, whichever are more


class PrefixGroups:
    """The groups that save at least `min_pages` page reads each, of the sequences that decode.
    They read whole runs of `pages_at_once` together.

    Between steps the work is that of the sequences which join or leave; a step in which the same
    ones decode is arranged as the one before it.
    """

    def __init__(self, min_pages: int, pages_at_once: int = 1) -> None:
        self._min_pages = min_pages
        self._at_once = pages_at_once
        self._root = PrefixNode(NO_PAGES, None, 0)
        self._nodes: dict[int, PrefixNode] = {}  # by uid, where its pages end
        self._joined: list[int] = []  # since the groups were chosen
        self._changed = False  # since then
        self._chosen: list[PrefixNode] = []
        self._group_of: dict[int, int] = {}  # by uid, an index of `_chosen`
        self._arranged: list[Sequence] = []  # what follows is for these
        self._order: list[int] = []
        self._groups: list[CascadeGroup] = []
        self.spared = 0  # page reads that these groups save
        self.num_spared = 0  # those of all steps

    def join(self, uid: int, pages: Pages) -> None:
        """A sequence begins to decode; `pages` are its first ones, filled by what it was fed.

        One that has been fed more joins anew: `KVCache.commit` may have replaced pages.
        """
        self.leave(uid)
        node, done = self._root, 0
        while done < len(pages):
            child = node.children.get(int(pages[done]))
            if child is None:
                child = PrefixNode(pages[done:].copy(), node, len(pages))
                node.children[int(pages[done])] = child
            else:
                shared = common_prefix(child.pages, 0, pages, done, len(child.pages))
                if shared < len(child.pages):
                    child = self._split(child, shared)
            node, done = child, child.depth
        self._nodes[uid] = node
        self._joined.append(uid)
        self._count(node, 1)

    def leave(self, uid: int) -> None:
        """A sequence decodes no more; nothing happens where it has not begun to."""
        node = self._nodes.pop(uid, None)
        if node is None:
            return
        self._group_of.pop(uid, None)
        self._count(node, -1)
        while node.parent is not None and not node.count:
            del node.parent.children[int(node.pages[0])]
            node = node.parent
        if node.parent is not None and len(node.children) == 1:
            (child,) = node.children.values()
            if child.count == node.count:
                child.pages = np.concatenate((node.pages, child.pages))
                child.parent = node.parent
                node.parent.children[int(child.pages[0])] = child

    def arrange(
        self, sequences: list[Sequence], chunks: list[Chunk]
    ) -> tuple[list[Sequence], list[Chunk], list[CascadeGroup]]:
        """A step's decoding sequences and their chunks, put in groups first, and the groups.

        Within a group and outside all of them the order stays as it is.
        """
        if self._changed:
            self._choose()
            self._arrange(sequences)
        elif self._chosen and sequences != self._arranged:
            self._arrange(sequences)
        if not self._groups:
            return sequences, chunks, []
        self.num_spared += self.spared
        pick = itemgetter(*self._order)
        return list(pick(sequences)), list(pick(chunks)), self._groups

    def _split(self, node: PrefixNode, length: int) -> PrefixNode:
        """Cut an edge after `length` pages; returns the new upper part."""
        assert node.parent is not None
        upper = PrefixNode(node.pages[:length], node.parent, node.depth - len(node.pages) + length)
        upper.count, upper.below, upper.saved = node.count, node.saved, node.saved
        node.pages = node.pages[length:]
        upper.children[int(node.pages[0])] = node
        node.parent.children[int(upper.pages[0])] = upper
        node.parent = upper
        return upper

    def _count(self, node: PrefixNode | None, change: int) -> None:
        """`change` more sequences end in `node`; what its path saves follows."""
        self._changed = True
        while node is not None:
            node.count += change
            saved = max(self._saves(node.depth, node.count), node.below)
            if node.parent is not None:
                node.parent.below += saved - node.saved
            node.saved = saved
            node = node.parent

    def _saves(self, num_pages: int, count: int) -> int:
        saved = num_pages // self._at_once * self._at_once * (count - 1)
        return saved if saved >= self._min_pages else 0

    def _choose(self) -> None:
        """The nodes whose sequences are groups, and the group of each sequence."""
        chosen, stack = [], [self._root]
        while stack:
            node = stack.pop()
            if node.saved and self._saves(node.depth, node.count) >= node.below:
                chosen.append(node)
            elif node.saved:
                stack += [child for child in node.children.values() if child.saved]
        if len(chosen) > MAX_CASCADE_GROUPS:
            best = set(nlargest(MAX_CASCADE_GROUPS, chosen, key=attrgetter("saved")))
            chosen = [node for node in chosen if node in best]
        unlabelled = self._joined
        if chosen != self._chosen:
            self._chosen, unlabelled = chosen, list(self._nodes)
            self._group_of.clear()
        index_of = {node: index for index, node in enumerate(chosen)}
        for uid in unlabelled if chosen else ():
            above = self._nodes.get(uid)
            while above is not None and above not in index_of:
                above = above.parent
            if above is not None:
                self._group_of[uid] = index_of[above]
        self._joined = []
        self._changed = False

    def _arrange(self, sequences: list[Sequence]) -> None:
        self._arranged, self._order, self._groups = list(sequences), [], []
        self.spared = 0
        if not self._chosen:
            return
        members: list[list[int]] = [[] for _ in self._chosen]
        others: list[int] = []
        group_of = self._group_of
        for index, sequence in enumerate(sequences):
            label = group_of.get(sequence.uid)
            (others if label is None else members[label]).append(index)
        for node, indices in zip(self._chosen, members, strict=True):
            if self._saves(node.depth, len(indices)):
                first = len(self._order)
                self.spared += self._saves(node.depth, len(indices))
                self._groups.append(CascadeGroup(first, len(indices), node.depth))
                self._order += indices
            else:
                others += indices
        self._order += sorted(others)
