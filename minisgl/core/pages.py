"""The physical KV pages: who holds how many of them, counted in one numpy array."""

from collections.abc import Sequence as Run

import numpy as np


class PagePool:
    """Reference counts of `num_pages` pages of `page_size` tokens, and the list of free ones.

    A page is free (no holder) or held by sequences, by the radix tree (at most once: it is then
    *cached*), or both. A page held by the tree alone is *idle*: eviction frees it.
    `num_idle` is kept up to date, so that admission costs O(1). Arguments hold no page twice.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_idle = 0
        self.num_cached = 0
        self._refs = np.zeros(num_pages, np.int32)
        self._cached = np.zeros(num_pages, np.bool_)
        self._free = list(range(num_pages - 1, -1, -1))  # a stack; the lowest page comes first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that are free or can be freed by evicting from the tree."""
        return len(self._free) + self.num_idle

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one holder. RuntimeError when there are fewer."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages asked of {len(self._free)} free ones")
        if count == 1:  # a decoding sequence crosses into its next page
            page = self._free.pop()
            self._refs[page] = 1
            return [page]
        first = len(self._free) - count
        pages = self._free[first:]
        del self._free[first:]
        pages.reverse()
        self._refs[pages] = 1
        return pages

    def hold(self, pages: Run[int]) -> None:
        """One more holder for each page; none of them may be free."""
        index = np.asarray(pages, np.intp)
        refs = self._refs[index]
        if not refs.all():
            raise RuntimeError(f"free pages held: {index[refs == 0].tolist()}")
        self.num_idle -= int(np.count_nonzero((refs == 1) & self._cached[index]))
        self._refs[index] = refs + 1

    def drop(self, pages: Run[int]) -> None:
        """One holder less for each page; a page without holders is free."""
        index = np.asarray(pages, np.intp)
        refs = self._refs[index] - 1
        if (refs < 0).any():
            raise RuntimeError(f"pages dropped more often than held: {index[refs < 0].tolist()}")
        self._refs[index] = refs
        self._free.extend(index[refs == 0].tolist())
        self.num_idle += int(np.count_nonzero((refs == 1) & self._cached[index]))

    def cache(self, pages: Run[int]) -> None:
        """The tree becomes one more holder of each page."""
        self.hold(pages)
        self._cached[pages] = True
        self.num_cached += len(pages)

    def uncache(self, pages: Run[int]) -> None:
        """The tree lets go of each page."""
        index = np.asarray(pages, np.intp)
        self.num_idle -= int(np.count_nonzero(self._refs[index] == 1))
        self.num_cached -= len(pages)
        self._cached[index] = False
        self.drop(pages)

    def is_idle(self, page: int) -> bool:
        return bool(self._refs[page] == 1 and self._cached[page])

    def num_idle_among(self, pages: Run[int]) -> int:
        """How many of a match's pages the tree alone holds."""
        return int(np.count_nonzero(self._refs[np.asarray(pages, np.intp)] == 1))

    def num_returning(self, pages: Run[int]) -> int:
        """How many of a holder's pages become available once that holder drops them."""
        index = np.asarray(pages, np.intp)
        return int(np.count_nonzero(self._refs[index] - self._cached[index] == 1))

    def check(self, held: list[int], cached: list[int]) -> None:
        """Compare the whole ledger with the pages `held`, once per holder, and those `cached`.

        For tests: RuntimeError naming what differs.
        """
        expected = np.bincount(np.array(held, np.intp), minlength=self.num_pages)
        marks = np.zeros(self.num_pages, np.bool_)
        marks[cached] = True
        if (wrong := self._refs != expected).any():
            page = int(wrong.argmax())
            raise RuntimeError(f"page {page}: {self._refs[page]} holders, not {expected[page]}")
        if sorted(self._free) != (expected == 0).nonzero()[0].tolist():
            raise RuntimeError("the free list is not the set of pages without holders")
        if (marks != self._cached).any() or self.num_cached != len(cached):
            raise RuntimeError("cached marks differ from the tree's pages")
        if self.num_idle != int((marks & (expected == 1)).sum()):
            raise RuntimeError(f"num_idle is {self.num_idle}, which is wrong")
