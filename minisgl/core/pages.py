"""The physical KV pages: who holds how many of them, counted in one numpy array."""

from collections.abc import Sequence as Run

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int32]
NO_PAGES: Pages = np.empty(0, np.int32)


class PagePool:
    """Reference counts of `num_pages` pages of `page_size` tokens, and the list of free ones.

    A page is free (no holder) or held by sequences, by the radix tree (at most once: it is then
    *cached*), or both. A page held by the tree alone is *idle*: eviction frees it.
    `num_idle` is kept up to date, so that admission costs O(1). Arguments hold no page twice.
    Pages are int32 arrays; arguments may be any run of integers.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_idle = 0
        self.num_cached = 0
        self.num_ever_cached = 0  # each as often as it was
        self.refs = np.zeros(num_pages, np.int32)
        self.cached = np.zeros(num_pages, np.bool_)
        self.num_free = num_pages
        # A stack whose first `num_free` entries count; the lowest page comes first.
        self.free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)

    @property
    def num_available(self) -> int:
        """Pages that are free or can be freed by evicting from the tree."""
        return self.num_free + self.num_idle

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> Pages:
        """`count` free pages, each with one holder. RuntimeError when there are fewer."""
        if count > self.num_free:
            raise RuntimeError(f"{count} pages asked of {self.num_free} free ones")
        end = self.num_free
        self.num_free -= count
        pages = self.free[self.num_free : end][::-1].copy()
        # A decoding sequence asks for one, and numpy is faster at a number than at an array.
        self.refs[pages if count != 1 else pages[0]] = 1
        return pages

    def hold(self, pages: Run[int] | Pages) -> None:
        """One more holder for each page; none of them may be free."""
        index = np.asarray(pages, np.intp)
        refs = self.refs[index]
        if not refs.all():
            raise RuntimeError(f"free pages held: {index[refs == 0].tolist()}")
        self.num_idle -= int(np.count_nonzero((refs == 1) & self.cached[index]))
        self.refs[index] = refs + 1

    def drop(self, pages: Run[int] | Pages) -> None:
        """One holder less for each page; a page without holders is free."""
        index = np.asarray(pages, np.intp)
        refs = self.refs[index] - 1
        if (refs < 0).any():
            raise RuntimeError(f"pages dropped more often than held: {index[refs < 0].tolist()}")
        self.refs[index] = refs
        freed = index[refs == 0]
        self.free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)
        self.num_idle += int(np.count_nonzero((refs == 1) & self.cached[index]))

    def cache(self, pages: Run[int] | Pages) -> None:
        """The tree becomes one more holder of each page."""
        self.hold(pages)
        self.cached[pages] = True
        self.num_cached += len(pages)
        self.num_ever_cached += len(pages)

    def uncache(self, pages: Run[int] | Pages) -> None:
        """The tree lets go of each page."""
        index = np.asarray(pages, np.intp)
        self.num_idle -= int(np.count_nonzero(self.refs[index] == 1))
        self.num_cached -= len(pages)
        self.cached[index] = False
        self.drop(pages)

    def is_idle(self, page: int | np.int32) -> bool:
        return bool(self.refs[page] == 1 and self.cached[page])

    def num_idle_among(self, pages: Pages) -> int:
        """How many of these cached pages the tree alone holds."""
        return int(np.count_nonzero(self.refs[pages] == 1))

    def num_idle_last(self, pages: Pages) -> int:
        """How many of these cached pages come after the last one that a sequence holds."""
        held = np.flatnonzero(self.refs[pages] != 1)
        return len(pages) - (int(held[-1]) + 1 if len(held) else 0)

    def num_returning(self, pages: Run[int] | Pages) -> int:
        """How many of a holder's pages become available once that holder drops them."""
        index = np.asarray(pages, np.intp)
        return int(np.count_nonzero(self.refs[index] - self.cached[index] == 1))
