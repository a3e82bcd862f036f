"""The page pool and the radix tree together: how sequences get pages, share and return them."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from minisgl.core.batch import CopyJob
from minisgl.core.pages import NO_PAGES, PagePool, Pages
from minisgl.core.radix import RadixTree
from minisgl.core.sequence import HeldPages, Sequence


@dataclass(slots=True)
class Match:
    """A cached prefix: whole pages, and the first `num_copied` tokens of page `source`."""

    pages: Pages
    source: int | None
    num_copied: int
    num_tokens: int


NO_MATCH = Match(NO_PAGES, None, 0, 0)

EVICTED_AT_ONCE = 64  # pages, where they are few of those that can be: each time has its cost


class KVCache:
    """Pages of sequences. Between `begin` and `finish` lies one plan.

    Prompt pages enter the tree when the step that writes them is planned: stream order makes them
    readable by the next step. In their own plan they are *fresh*, and not yet to be matched.
    """

    def __init__(
        self, num_pages: int, page_size: int, *, radix: bool = True, drafts: bool = False
    ) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.tree = RadixTree(self.pool)
        self.page_size = page_size
        self._radix = radix
        # Leading slots of each page that hold the draft model's KV, if there is one.
        self._drafted = np.zeros(num_pages, np.int32) if drafts else None
        self._num_plans = 0
        self._filled_in = np.zeros(num_pages, np.int64)  # by page, the plan that cached it
        self._copies: list[CopyJob] = []
        # What is remembered of admissions that failed; see `refused`.
        self._num_returned = 0  # pages that became available, ever
        # Of that, how many it must be (less the headroom); and the tokens that were matched.
        self._refused: WeakKeyDictionary[Sequence, tuple[int, int]] = WeakKeyDictionary()
        # Tokens found when a sequence was last looked up; pages that the tree had taken in then.
        self._found: WeakKeyDictionary[Sequence, tuple[int, int]] = WeakKeyDictionary()

    def begin(self) -> None:
        """A plan begins."""
        self._num_plans += 1
        self._copies = []

    def finish(self) -> list[CopyJob]:
        """A plan is complete: its copy jobs, whose sources are no longer held."""
        for job in self._copies:
            self._drop([job.source])
        return self._copies

    def match(self, sequence: Sequence) -> Match:
        """The longest cached prefix that leaves at least the last token to compute.

        Requests for prompt log-probabilities get none, as every position's logits are needed.
        """
        if not self._radix or sequence.num_unscored:
            return NO_MATCH
        pages, source, num_copied = self.tree.match(
            sequence.request.cache_salt, sequence.tokens(sequence.num_tokens - 1)
        )
        num_tokens = len(pages) * self.page_size + num_copied
        self._found[sequence] = num_tokens, self.pool.num_ever_cached
        return Match(pages, source, num_copied, num_tokens)

    def num_matched(self, sequence: Sequence) -> int:
        """Tokens of its match, looked up again only once the tree has taken in more.

        What has been evicted since still counts.
        """
        num_tokens, num_pages = self._found.get(sequence, (0, -1))
        is_known = num_pages == self.pool.num_ever_cached
        return num_tokens if is_known else self.match(sequence).num_tokens

    def most_matched(self, sequence: Sequence) -> int:
        """Tokens that a waiting sequence's match may have, at most, without looking it up.

        It grows by no more than the tree has taken in since it was last looked up.
        """
        num_tokens, num_pages = self._found.get(sequence, (sequence.num_tokens, 0))
        return num_tokens + (self.pool.num_ever_cached - num_pages) * self.page_size

    def is_fresh(self, match: Match) -> bool:
        """Whether part of `match` is being computed by the plan under way."""
        pages = match.pages if match.source is None else [match.source]
        return len(pages) > 0 and bool(self._filled_in[pages[-1]] == self._num_plans)

    def refused(self, sequence: Sequence, headroom: int) -> Match | None:
        """The match, without its pages, with which `attach` failed, if it would fail again.

        It fails where the sequence, the headroom and what others hold outside its match are more
        than the pool. What others hold outside shrinks by pages that become available, which are
        counted, and where they enter its match: `commit` then forgets that it failed.
        """
        missing, num_tokens = self._refused.get(sequence, (-headroom, 0))
        if missing + headroom <= self._num_returned:
            return None
        return Match(NO_MATCH.pages, None, 0, num_tokens)

    def attach(self, sequence: Sequence, match: Match, headroom: int) -> bool:
        """Give a sequence its match and pages for all tokens it holds; False if they do not fit.

        `headroom` pages must stay available beside them. A partly matched page is copied into
        the first new page, unless keeping its source would leave too few pages.
        """
        pool = self.pool
        need = pool.pages_for(sequence.num_tokens) - len(match.pages)
        missing = need + pool.num_idle_among(match.pages) - pool.num_available
        if missing + headroom > 0:
            self._refused[sequence] = missing + self._num_returned, match.num_tokens
            return False
        self._refused.pop(sequence, None)
        self._found.pop(sequence, None)
        pool.hold(match.pages)
        if match.source is not None:
            pool.hold([match.source])
        if match.source is not None and need + headroom > pool.num_available:
            self._drop([match.source])
            match = Match(match.pages, None, 0, len(match.pages) * self.page_size)
        self._make_room(need)
        kv = sequence.kv = HeldPages()
        kv.extend(np.concatenate((match.pages, self._take(need))))
        kv.capacity = kv.count * self.page_size
        sequence.num_computed = match.num_tokens
        if match.source is not None:
            target = int(kv.pages[len(match.pages)])
            self._copies.append(CopyJob(match.source, target, match.num_copied))
            if self._drafted is not None:
                self._drafted[target] = min(self._drafted[match.source], match.num_copied)
        kv.num_drafted = self._num_drafted(kv.pages, match.num_tokens)
        return True

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence pages for `num_tokens` tokens; False if there are too few."""
        kv = sequence.kv
        need = self.pool.pages_for(num_tokens) - kv.count
        if need > 0:
            if not self._make_room(need):
                return False
            kv.extend(self._take(need))
            kv.capacity = kv.count * self.page_size
        return True

    def commit(self, sequence: Sequence, start: int, stop: int) -> None:
        """Cache the whole pages that a chunk [start, stop) of known tokens completes.

        Where the tree holds other pages for what the sequence computed before, the sequence
        adopts those. What the chunk itself writes is never swapped: it would be written twice.
        Nor are pages adopted in the plan that writes them; both are left to a later chunk.
        """
        own, whole = start // self.page_size, stop // self.page_size
        if not self._radix or own == whole:
            return
        namespace = sequence.request.cache_salt
        tokens = sequence.tokens(whole * self.page_size)
        canonical, _, _ = self.tree.match(namespace, tokens)
        if len(canonical) and self._filled_in[canonical[-1]] == self._num_plans:
            return
        self._adopt(sequence, canonical[:own])
        pages = sequence.kv.pages
        if not np.array_equal(canonical[own:], pages[own : len(canonical)]):
            return
        self.tree.insert(namespace, tokens, pages[:whole])
        self._filled_in[pages[len(canonical) : whole]] = self._num_plans
        at = len(canonical) * self.page_size
        new = sequence.token_ids(at, at + 1)
        for waiting in [w for w in self._refused if w.token_ids(at, at + 1) == new]:
            del self._refused[waiting]

    def note_drafted(self, sequence: Sequence) -> None:
        """The draft model has computed, or will before the next plan's step, what is counted."""
        if self._drafted is not None:
            count = sequence.kv.num_drafted
            pages = sequence.kv.pages[: self.pool.pages_for(count)]
            slots = np.minimum(count - self.page_size * np.arange(len(pages)), self.page_size)
            self._drafted[pages] = np.maximum(self._drafted[pages], slots)

    def continuation(self, sequence: Sequence, path: list[int], count: int) -> list[int]:
        """Up to `count` tokens that follow those of `sequence` and then `path` in the tree."""
        tokens = np.concatenate((sequence.tokens(sequence.num_tokens), np.array(path, np.int32)))
        return self.tree.continuation(sequence.request.cache_salt, tokens, count)

    def release(self, sequence: Sequence) -> None:
        """Take back a sequence's pages, once: they move out of it. Nothing may be in flight.

        Everything it computed is cached first, to the token.
        """
        computed = min(sequence.num_computed, sequence.num_tokens)
        self.note_drafted(sequence)
        pages, sequence.kv = sequence.kv.pages, HeldPages()
        if self._radix and computed:
            filled = pages[: self.pool.pages_for(computed)]
            self.tree.insert(sequence.request.cache_salt, sequence.tokens(computed), filled)
        self._drop(pages)

    def _adopt(self, sequence: Sequence, canonical: Pages) -> None:
        kv = sequence.kv
        changed = np.flatnonzero(canonical != kv.pages[: len(canonical)])
        if len(changed):
            self.pool.hold(canonical[changed])
            old = kv.pages[changed]
            kv.pages[changed] = canonical[changed]
            kv.num_drafted = self._num_drafted(kv.pages, kv.num_drafted)
            kv.num_patched = min(kv.num_patched, int(changed[0]))
            self._drop(old)

    def _take(self, count: int) -> Pages:
        pages = self.pool.take(count)
        if self._drafted is not None:
            self._drafted[pages] = 0
        return pages

    def _num_drafted(self, pages: Pages, most: int) -> int:
        """Of the first `most` tokens, those before the first slot that the draft model lacks."""
        if self._drafted is None:
            return 0
        slots = self._drafted[pages[: self.pool.pages_for(most)]]
        short = np.flatnonzero(slots < self.page_size)
        if not len(short):
            return most
        return min(int(short[0]) * self.page_size + int(slots[short[0]]), most)

    def _make_room(self, count: int) -> bool:
        missing = count - self.pool.num_free
        if missing > 0:
            if self.pool.num_idle:
                self.tree.evict(max(missing, min(self.pool.num_idle // 32, EVICTED_AT_ONCE)))
            return self.pool.num_free >= count
        return True

    def _drop(self, pages: list[int] | Pages) -> None:
        before = self.pool.num_available
        self.pool.drop(pages)
        self._num_returned += self.pool.num_available - before
        self.tree.unpark(pages)
